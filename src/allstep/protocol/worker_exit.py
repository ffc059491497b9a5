"""How a worker's process ended, as a value, and its status in words: pure functions.

What it last wrote says more of the reason; `last_words` reads that.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """The end of one worker.

    `returncode` is as subprocess gives it (-N: killed by signal N), `killed` true where the supervisor's SIGKILL ended
    it, `stderr` the last text that it wrote to standard error, and `note` a sentence that the supervisor can add, such
    as that memory ran out.
    """

    rank: int
    returncode: int
    killed: bool = False
    stderr: str = ""
    note: str = ""


def exit_status(returncode: int) -> int:
    """Return the status that a shell would show: 128 + N for a death by signal N."""
    return returncode if returncode >= 0 else 128 - returncode


def describe(returncode: int) -> str:
    """Say in words how a process ended."""
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"killed by {signal_name(-returncode)} (exit code {exit_status(returncode)})"


def signal_name(number: int) -> str:
    """The name of a signal, also of one that has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
