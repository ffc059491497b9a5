"""When a handler is due, as arithmetic on its event's counter.

Contract: a filter is a value. `matches(count)` says whether the handler is due at this count; `next_due(count)` gives
the smallest count from `count` on at which it may be, so that the loop can leave a handler alone until then. A filter
whose answer only a user's function knows is a candidate at every count.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

NEVER = math.inf


def is_count(value: object, least: int) -> bool:
    """Whether `value` is an integer, of Python or numpy, of at least `least`."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


class Filter(Protocol):
    """When a handler is due."""

    def matches(self, engine: Any, count: int) -> bool:
        """Whether the handler is due at this count of its event."""

    def next_due(self, count: int) -> float:
        """The smallest count, from `count` on, at which the handler may be due; infinity when there is none."""


@dataclass(frozen=True, slots=True)
class Every:
    """Due each `step` counts: at `step`, 2 `step` …, or, given bounds, at `after` + 1, `after` + 1 + `step` …"""

    step: int
    after: int | None = None
    before: float = NEVER

    def matches(self, engine: Any, count: int) -> bool:
        """Whether `count` is one of the series and inside the bounds."""
        return self.next_due(count) == count

    def next_due(self, count: int) -> float:
        """The first count of the series from `count` on."""
        first = 0 if self.after is None else self.after + 1
        due = count if count <= first else count + (first - count) % self.step
        due = max(due, first)
        return due if due < self.before else NEVER


@dataclass(frozen=True, slots=True)
class Once:
    """Due at the given counts, which are sorted."""

    counts: tuple[int, ...]

    def matches(self, engine: Any, count: int) -> bool:
        """Whether `count` is one of them."""
        return count in self.counts

    def next_due(self, count: int) -> float:
        """The first of them from `count` on."""
        at = bisect_left(self.counts, count)
        return self.counts[at] if at < len(self.counts) else NEVER


@dataclass(frozen=True, slots=True)
class Predicate:
    """Due when the user's `function(engine, count)` says so."""

    function: Callable[[Any, int], bool]

    def matches(self, engine: Any, count: int) -> bool:
        """What the function answers."""
        return bool(self.function(engine, count))

    def next_due(self, count: int) -> float:
        """Every count: only the function knows."""
        return count
