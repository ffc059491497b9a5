"""`Pace`: a filter that lets an event through about every so many seconds, and costs nothing in between.

Contract: it is one rank's clock, so nothing that ranks do together may hang on it. The clock is not read at each count
but about twenty times a second, by how fast counts went by since the last look. Counts are never more than `MOST_APART`
from one look to the next, which bounds how late a run that slows down is noticed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LOOKS_APART_S = 0.05
MOST_APART = 1000


class Pace:
    """Due when `seconds` have passed since it was due last, or since `begin`.

    Args:
        seconds: between one time and the next; 0 for each count.
        clock: seconds that never go back.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self.begin(0)

    def begin(self, count: int) -> None:
        """Begin an interval now, at this count."""
        self._due_at = self._clock() + self.seconds
        self._look(count, self._clock(), 1)

    def matches(self, engine: Any, count: int) -> bool:
        """Whether the time is up."""
        if count < self._next:
            return False
        now = self._clock()
        apart = count - self._looked
        rate = apart / max(now - self._looked_at, 1e-9)
        # At most four times as far as before: a few quick counts say little about those to come.
        self._look(count, now, min(int(rate * LOOKS_APART_S), 4 * max(1, apart), MOST_APART))
        if now < self._due_at:
            return False
        self._due_at = now + self.seconds
        return True

    def next_due(self, count: int) -> float:
        """The count of the next look."""
        return max(count, self._next)

    def _look(self, count: int, now: float, apart: int) -> None:
        self._looked, self._looked_at = count, now
        self._next = count + (max(1, apart) if self.seconds else 1)
