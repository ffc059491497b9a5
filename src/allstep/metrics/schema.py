"""What of a metric is reduced over ranks, as lines that ranks compare before anything is reduced.

Contract: a `Schema` lists every state in the order in which it is packed. Behind the states it says, in lines without
one, what else has to be the same: how metrics were made and when they are fed. Two ranks may reduce together exactly
when their schemas are equal. `coordination.compare` does the comparing; the words for a difference are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from allstep.coordination import by_ranks
from allstep.errors import MetricMismatchError


class StateLine(NamedTuple):
    """One state: at which event and in which metric, by what name, and how it is reduced, with type and shape.

    A line whose state is "" is about the metric itself.
    """

    event: str
    metric: str
    state: str
    form: str

    def difference(self, at: int, lines: Sequence[StateLine | None]) -> MetricMismatchError:
        """The error for ranks that differ in the line at place `at`, named by metric, state and ranks."""
        return MetricMismatchError(
            f"ranks reduce different metrics: {_told(at, lines)}. Attach the same metrics, made with the same "
            "arguments, in the same order on every rank"
        )


Schema: TypeAlias = tuple[StateLine, ...]


def _told(at: int, lines: Sequence[StateLine | None]) -> str:
    known = [line for line in lines if line is not None]
    if len(known) == len(lines) and len({line[:3] for line in known}) == 1:
        said = by_ranks([line.form for line in known])
        state = f", state {known[0].state!r}" if known[0].state else ""
        return f"metric {known[0].metric!r}{state}, at {known[0].event}, is {said}"
    if any(line.state for line in known):
        return f"state number {at + 1} is {by_ranks([_state(line) for line in lines])}"
    return f"there is {by_ranks([_metric(line) for line in lines])}"


def _state(line: StateLine | None) -> str:
    if line is None or not line.state:
        return "no further state"
    return f"metric {line.metric!r}, state {line.state!r}, at {line.event}"


def _metric(line: StateLine | None) -> str:
    return "no further metric" if line is None else f"metric {line.metric!r}, {line.form}, at {line.event},"
