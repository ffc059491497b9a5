"""Which rank's end is the cause of the others': pure functions over what became of each rank of a call.

Contract: `Ended` is one rank's end. `is_settled` says whether waiting for the others could still change the verdict,
`first_failure` gives it. A death by a signal and an ordinary exception are causes; an error about a lost connection or
a collective that broke follows from another's end, so it is the verdict only where nothing else is known.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from allstep.channel.ending import about_a_lost_connection, signal_name
from allstep.testing.call import Outcome


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank's call ended. Without an `outcome` the process died, or, if `is_late`, did not come to an end.

    `exit_code` is that of a process that died, -N for signal N; `stacks` is where its threads stood.
    """

    rank: int
    outcome: Outcome | None = None
    exit_code: int | None = None
    stacks: str = ""
    is_late: bool = False

    @property
    def failed(self) -> bool:
        """Whether the rank gave no result."""
        return self.outcome is None or self.outcome.end != "returned"

    @property
    def is_cause(self) -> bool:
        """Whether this end explains itself, and is not most likely about another's."""
        if self.is_late or not self.failed:
            return False
        if self.outcome is None:
            return self.exit_code != -signal.SIGABRT
        return not about_a_lost_connection(self.outcome.text)

    def describe(self, world_size: int) -> str:
        """What happened, with the traceback or the stacks."""
        name = f"rank {self.rank} of {world_size}"
        if self.outcome is None:
            code = self.exit_code
            how = f" ({signal_name(-code)})" if code is not None and code < 0 else ""
            stacks = f":\n{self.stacks}" if self.stacks else ""
            return f"{name} died with exit code {code}{how}{stacks}"
        if self.outcome.end == "unloadable":
            return f"{name} could not load the function or its arguments:\n{self.outcome.text}"
        return f"{name} raised:\n{self.outcome.text}"


def is_settled(ends: Sequence[Ended]) -> bool:
    """Whether one of the ends is a cause, so that no other end can be the first."""
    return any(end.is_cause for end in ends)


def first_failure(ends: Sequence[Ended]) -> Ended | None:
    """The end to report, None where all ranks returned.

    Args:
        ends: in the order in which they were learnt.
    """
    failures = [end for end in ends if end.failed]
    return min(failures, key=lambda end: (not end.is_cause, end.is_late), default=None)
