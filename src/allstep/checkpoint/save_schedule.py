"""When a checkpoint is due: after so many iterations or epochs, or after some time, the same on every rank.

Contract: `Checkpoint` asks `iteration_is_due` after each accumulation group and `epoch_is_due` at each epoch's end, and
says with `saved` that it saved. Iterations and epochs are counted alike everywhere. Clocks are not, so rank 0's
decides. It is asked in a broadcast at iterations that all ranks know. These are close enough together to keep the time
within a twentieth or two seconds, and never so close that asking costs anything. A job whose environment says so saves
once after its first group besides, to measure a save; see `allstep.protocol.save_record`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from allstep.coordination import Coordinator
from allstep.errors import ArgumentError
from allstep.protocol.save_record import MEASURE

SaveEvery: TypeAlias = int | str | timedelta

_UNITS = {"iteration": 1.0, "epoch": 1.0, "second": 1.0, "minute": 60.0, "hour": 3600.0}
_TEXT = re.compile(r"(?:(\d+(?:\.\d+)?)\s*)?([a-z]+?)s?")


@dataclass(frozen=True, slots=True)
class SaveTimes:
    """When: each so many iterations, epochs, or seconds; None for never."""

    iterations: int | None = None
    epochs: int | None = None
    seconds: float | None = None


def read_every(every: SaveEvery | Sequence[SaveEvery] | None) -> SaveTimes:
    """Read `every`: iterations as an int, a timedelta, a text such as "epoch" or "10 minutes", or several of these.

    Raises:
        ArgumentError: it is none of these.
    """
    found: dict[str, float] = {}
    several = every if isinstance(every, Sequence) and not isinstance(every, str) else (every,)
    for each in () if every is None else several:
        name, count = _read_one(each)
        found[name] = min(count, found.get(name, count))
    iterations, epochs = found.get("iterations"), found.get("epochs")
    return SaveTimes(
        None if iterations is None else int(iterations), None if epochs is None else int(epochs), found.get("seconds")
    )


def _read_one(each: object) -> tuple[str, float]:
    if isinstance(each, timedelta) and each.total_seconds() > 0:
        return "seconds", each.total_seconds()
    # A bool is an int to Python, and `every=True` means nothing.
    if isinstance(each, int) and not isinstance(each, bool) and each >= 1:
        return "iterations", each
    match = _TEXT.fullmatch(each.strip().lower()) if isinstance(each, str) else None
    if match is not None and match[2] in _UNITS:
        count = float(match[1] or 1) * _UNITS[match[2]]
        kind = match[2] + "s" if match[2] in ("iteration", "epoch") else "seconds"
        if count > 0 and (kind == "seconds" or count.is_integer()):
            return kind, count
    raise ArgumentError(
        f'every is {each!r}; give iterations as an int, a timedelta, or a text such as "epoch", "2 epochs", '
        '"500 iterations" or "10 minutes"'
    )


class SaveSchedule:
    """Whether a checkpoint is due, of one run."""

    def __init__(
        self, times: SaveTimes, coordinator: Coordinator, iteration: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._times = times
        self._coordinator = coordinator
        self._clock = clock
        self._saved_iteration = iteration
        self._saved_time = self._asked_time = clock()
        self._next_ask = self._asked_iteration = iteration
        self._time_is_up = os.environ.get(MEASURE) == "1"

    def iteration_is_due(self, iteration: int) -> bool:
        """Whether to save after this iteration, which ends a group."""
        every = self._times.iterations
        # A multiple may have been passed inside a group, so it is looked for since the last save.
        if every is not None and iteration // every > self._saved_iteration // every:
            return True
        if self._times.seconds is not None and iteration >= self._next_ask:
            self._ask_clock(iteration)
        return self._time_is_up

    def epoch_is_due(self, epoch: int, iteration: int) -> bool:
        """Whether to save at this epoch's end."""
        every = self._times.epochs
        return (every is not None and epoch % every == 0) or self.iteration_is_due(iteration)

    def saved(self, iteration: int) -> None:
        """A checkpoint was taken after this iteration."""
        self._saved_iteration, self._time_is_up = iteration, False
        self._saved_time = self._clock()

    def _ask_clock(self, iteration: int) -> None:
        assert self._times.seconds is not None
        now = self._clock()
        # Seconds an iteration took since the clock was last asked; the next time is so many iterations later.
        pace = (now - self._asked_time) / max(1, iteration - self._asked_iteration)
        apart = max(2.0, self._times.seconds / 20)
        # At most four times as far as last time: a few quick iterations say little about those to come.
        steps = min(int(apart / pace) if pace > 0 else 1 << 20, 4 * max(1, iteration - self._asked_iteration))
        mine = (now - self._saved_time >= self._times.seconds, iteration + max(1, steps))
        self._time_is_up, self._next_ask = self._coordinator.broadcast(mine, 0)
        self._asked_iteration, self._asked_time = iteration, now
