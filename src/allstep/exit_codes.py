"""The statuses with which a rank and a run end, beside the script's own and 128 + N for a death by signal N.

The status of a run is that of the first cause.
"""

from __future__ import annotations

USER_ERROR = 1
"""An exception that nobody caught; Python's own status for it."""

LAUNCHER_ERROR = 2
"""Nothing was started: a wrong option, a configuration that cannot be read, a program that is not there."""

HANG = 83
"""A rank made no progress for longer than its section may last."""

PEER_LOST = 84
"""This rank or node left because another one failed, or because the link to the others was lost."""

PREEMPTED = 85
"""The run was asked to make room, has saved its state, and wants to be started again."""

NEVER_AGAIN = 93
"""A submitted job stopped and is not started again: its last starts got no further, or it was cancelled."""

CANCELLED = 130
"""A person pressed Ctrl-C, and the run has ended in good order; the status of a death by SIGINT."""

IN_ORDER = (0, PREEMPTED, CANCELLED)
"""Statuses with which all ranks leave alike, so that none of them has failed."""
