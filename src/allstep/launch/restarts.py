"""Whether a run that failed begins another attempt: a pure function of what its attempts came to.

Progress is the furthest (epoch, iteration) that a rank of an attempt told over the control channel. An attempt in which
no rank came through `init` told none, and came no further than any other: whether the script does not get that far or
does not use allstep cannot be told from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Progress = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that failed: its number, how far it came, and its first cause in a few words."""

    number: int
    progress: Progress
    summary: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to begin another attempt, and why."""

    again: bool
    reason: str


def decide(failed: Sequence[FailedAttempt], *, max_restarts: int, stop_after: int) -> Decision:
    """Decide after a failure.

    Args:
        failed: this run's attempts in order, all failed; at least one.
        max_restarts: restarts that the run may take.
        stop_after: restarts in a row without progress after which it ends all the same.
    """
    restarts = len(failed) - 1
    if restarts >= max_restarts:
        return Decision(False, f"{_times(restarts)} taken" if restarts else "no restarts were asked for")
    stalled = _stalled(failed)
    if stalled >= stop_after:
        return Decision(False, f"{_times(stalled)} in a row {_where(_furthest(failed))}")
    return Decision(True, f"restart {restarts + 1} of at most {max_restarts}")


def _stalled(failed: Sequence[FailedAttempt]) -> int:
    """Restarts since an attempt last came further than all before it."""
    furthest: Progress = None
    stalled = -1  # the first attempt is no restart
    for attempt in failed:
        if attempt.progress is not None and (furthest is None or attempt.progress > furthest):
            furthest = attempt.progress
            stalled = 0
        else:
            stalled += 1
    return stalled


def _furthest(failed: Sequence[FailedAttempt]) -> Progress:
    return max((each.progress for each in failed if each.progress is not None), default=None)


def _where(furthest: Progress) -> str:
    if furthest is None:
        return (
            "ended before all ranks had come through allstep.init, so another would too; for a script that does not "
            "use allstep, give --stop-after a larger number"
        )
    epoch, iteration = furthest
    return f"got no further than epoch {epoch}, iteration {iteration}, so another would not either"


def _times(restarts: int) -> str:
    return f"{restarts} restart{'s' if restarts != 1 else ''}"
