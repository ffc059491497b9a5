"""Naming what a rank waits for its peers in, so that ranks which wait in different places can be told apart.

Contract: each method of World that meets the other ranks enters what `Waits.at` gives for its name. The pulse then
says, as long as it lasts, what it is, the how-manieth meeting of this World, and from where it was called: `all_reduce
#3 at train.py:57`. On ranks that are together number and name are the same.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import FrameType

from allstep.channel.pulse import Pulse


class Waits:
    """The meetings of one World, counted."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._count = 0

    def at(self, name: str, depth: int) -> AbstractContextManager[None]:
        """Wait in `name` for the length of a with block; the user's line is `depth` frames above World's `_waits`."""
        self._count += 1
        user: FrameType | None = sys._getframe(2)
        for _ in range(depth):
            user = None if user is None else user.f_back
        where = "" if user is None else f" at {user.f_code.co_filename.rpartition('/')[2]}:{user.f_lineno}"
        return self._pulse.wait(f"{name} #{self._count}{where}")
