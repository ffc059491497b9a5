"""How far a run has come, from the heartbeats of all ranks: a few numbers, however many ranks there are. Pure.

`Progress` is one look at all ranks, `look` makes it. `IterationRate` keeps some earlier looks and says how many
iterations a second the run does, over the last minute: an evaluation or a save in between counts as the time it takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from allstep.protocol.messages import Heartbeat

WINDOW_S = 60.0
"""Seconds over which a rate is taken."""

_LEAST_S = 2.0  # between two looks of which one gives a rate


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the ranks are.

    Attributes:
        engine: the engine that runs, or ran last.
        epoch: of the rank that is furthest, counted from 1; 0 before the first.
        iteration: of the rank that is furthest.
        behind: how many iterations the last rank is behind it.
        goal: how many iterations the run is to have; 0 where that is not known.
        section: where rank 0 is, such as "step"; see `allstep.protocol.messages.SECTIONS`.
        ranks: how many have been heard of.
    """

    engine: str
    epoch: int
    iteration: int
    behind: int
    goal: int
    section: str
    ranks: int


def look(heartbeats: Iterable[Heartbeat]) -> Progress | None:
    """Fold the last heartbeat of each rank; None where none has come."""
    known = sorted(heartbeats, key=lambda each: each.rank)
    if not known:
        return None
    first = known[0]
    # A rank may be an engine ahead or behind for a moment; iterations of different engines do not compare.
    alike = [each for each in known if each.engine == first.engine]
    furthest = max(alike, key=lambda each: (each.epoch, each.iteration))
    return Progress(
        engine=first.engine,
        epoch=furthest.epoch,
        iteration=furthest.iteration,
        behind=furthest.iteration - min(each.iteration for each in alike),
        goal=max(each.goal for each in alike),
        section=first.section,
        ranks=len(known),
    )


class IterationRate:
    """Iterations a second, over the last looks."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()

    def note(self, now: float, iteration: int) -> float | None:
        """Take a look into account and return the rate; None where nothing can be said yet.

        Args:
            now: seconds on a clock that is never turned back.
            iteration: how far the run is. One that is lower than before is another run's, and begins anew.
        """
        looks = self._looks
        if looks and iteration < looks[-1][1]:
            looks.clear()
        if iteration:  # before the first one a run is not under way
            looks.append((now, iteration))
        while len(looks) > 2 and now - looks[1][0] >= WINDOW_S:
            looks.popleft()
        if len(looks) < 2 or now - looks[0][0] < _LEAST_S:
            return None
        return (iteration - looks[0][1]) / (now - looks[0][0])
