"""When a checkpoint is due: after so many iterations or epochs, or after some time, the same on every rank.

Contract: `Checkpoint` asks `iteration_is_due` after each accumulation group and `epoch_is_due` at each epoch's end, and
says with `saved` that it did. Iterations and epochs are counted alike everywhere. Clocks are not: rank 0's decides, and
it is asked in a broadcast at iterations that all ranks know, close enough together for the time to be kept within a
twentieth or two seconds, and never so close that asking costs anything.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from allstep.coordination import Coordinator

Every: TypeAlias = int | str | timedelta

_UNITS = {"iteration": 1.0, "epoch": 1.0, "second": 1.0, "minute": 60.0, "hour": 3600.0}
_TEXT = re.compile(r"(?:(\d+(?:\.\d+)?)\s*)?([a-z]+?)s?")


@dataclass(frozen=True, slots=True)
class Times:
    """When: each so many iterations, epochs, or seconds; None for never."""

    iterations: int | None = None
    epochs: int | None = None
    seconds: float | None = None


def read_every(every: Every | Sequence[Every] | None) -> Times:
    """Read `every`: iterations as an int, a timedelta, a text such as "epoch" or "10 minutes", or several of these.

    Raises:
        ValueError: it is none of these.
    """
    found: dict[str, float] = {}
    several = every if isinstance(every, Sequence) and not isinstance(every, str) else (every,)
    for each in () if every is None else several:
        name, count = _read_one(each)
        found[name] = min(count, found.get(name, count))
    iterations, epochs = found.get("iterations"), found.get("epochs")
    return Times(
        None if iterations is None else int(iterations), None if epochs is None else int(epochs), found.get("seconds")
    )


def _read_one(each: object) -> tuple[str, float]:
    if isinstance(each, timedelta) and each.total_seconds() > 0:
        return "seconds", each.total_seconds()
    if isinstance(each, int) and not isinstance(each, bool) and each >= 1:
        return "iterations", each
    match = _TEXT.fullmatch(each.strip().lower()) if isinstance(each, str) else None
    if match is not None and match[2] in _UNITS:
        count = float(match[1] or 1) * _UNITS[match[2]]
        kind = match[2] + "s" if match[2] in ("iteration", "epoch") else "seconds"
        if count > 0 and (kind == "seconds" or count.is_integer()):
            return kind, count
    raise ValueError(
        f'every is {each!r}; give iterations as an int, a timedelta, or a text such as "epoch", "2 epochs", '
        '"500 iterations" or "10 minutes"'
    )


class Schedule:
    """Whether a checkpoint is due, of one run."""

    def __init__(
        self, times: Times, coordinator: Coordinator, iteration: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._times = times
        self._coordinator = coordinator
        self._clock = clock
        self._saved_at = iteration
        self._began = self._asked_at = clock()
        self._ask_at = self._last_ask = iteration
        self._is_late = False

    def iteration_is_due(self, iteration: int) -> bool:
        """Whether to save after this iteration, which ends a group."""
        every = self._times.iterations
        if every is not None and iteration // every > self._saved_at // every:
            return True
        if self._times.seconds is not None and iteration >= self._ask_at:
            self._ask(iteration)
        return self._is_late

    def epoch_is_due(self, epoch: int, iteration: int) -> bool:
        """Whether to save at this epoch's end."""
        every = self._times.epochs
        return (every is not None and epoch % every == 0) or self.iteration_is_due(iteration)

    def saved(self, iteration: int) -> None:
        """A checkpoint was taken after this iteration."""
        self._saved_at, self._is_late = iteration, False
        self._began = self._clock()

    def _ask(self, iteration: int) -> None:
        assert self._times.seconds is not None
        now = self._clock()
        pace = (now - self._asked_at) / max(1, iteration - self._last_ask)
        apart = max(2.0, self._times.seconds / 20)
        steps = min(int(apart / pace) if pace > 0 else 1 << 20, 4 * max(1, iteration - self._last_ask))
        mine = (now - self._began >= self._times.seconds, iteration + max(1, steps))
        self._is_late, self._ask_at = self._coordinator.broadcast(mine, 0)
        self._last_ask, self._asked_at = iteration, now
