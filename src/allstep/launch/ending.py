"""How workers ended, and which end is the cause of the others: pure functions.

When one rank fails, its peers soon fail too, because their connections to it break. `first_cause` picks the end to
report; the exit status of the run is that of this end.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass

SETTLE = 0.3
"""Seconds after the first failure within which another's end may still be the cause."""

_CONNECTION_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken ?pipe|connection(reset|refused|aborted)error"
    r"|socket (closed|timeout)|sendbytes failed|recvbytes failed|recvvalue failed|failed to recv"
    r"|dist(backend|network|store)error|ncclremoteerror|remote process (has )?(exited|terminated)"
    r"|process ?group ?watchdog|heartbeat monitor|(read|write) error .*peer|timeout caused pair closure",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """The end of one worker.

    `returncode` is as subprocess gives it (-N: killed by signal N), `at` in seconds on any one clock, `killed` true
    where the supervisor's SIGKILL ended it, and `stderr` the last text that it wrote to standard error.
    """

    rank: int
    returncode: int
    at: float
    killed: bool = False
    stderr: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ended badly on its own account."""
        return self.returncode != 0 and not self.killed


def first_cause(ends: Iterable[WorkerEnd]) -> WorkerEnd | None:
    """Return the end that explains the others, or None where nobody failed.

    The first to fail, unless within `SETTLE` seconds of it another died by a signal or of an error that is not about
    a lost connection: those come from the rank itself, a lost connection comes from another's end.
    """
    failures = [end for end in ends if end.failed]
    if not failures:
        return None
    first = min(end.at for end in failures)
    return min(
        (end for end in failures if end.at <= first + SETTLE), key=lambda end: (_distance(end), end.at, end.rank)
    )


def exit_status(returncode: int) -> int:
    """Return the status that a shell would show: 128 + N for a death by signal N."""
    return returncode if returncode >= 0 else 128 - returncode


def describe(returncode: int) -> str:
    """Say in words how a process ended."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"killed by {name} (exit code {exit_status(returncode)})"


def _distance(end: WorkerEnd) -> int:
    """How far from the cause an end of this kind usually is: 0 by itself, 2 most likely after another's."""
    aborted = end.returncode == -signal.SIGABRT  # how a communication library ends a process whose peer is gone
    if end.returncode < 0 and not aborted:
        return 0
    return 2 if _CONNECTION_LOST.search(_last_words(end.stderr)) else 1


def _last_words(stderr: str) -> str:
    return "\n".join(stderr.rstrip().splitlines()[-12:])
