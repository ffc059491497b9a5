"""`Timer`: how long something in a run takes, from one event to another.

Contract: attached to one engine, on every rank alike where it has a name. It starts at one event and stops at another,
again and again, and adds up. `pause` and `resume` leave something out, such as an evaluation. With a name, the mean
over the ranks is in `state.metrics` at each epoch's end; sums over ranks ride in the votes that ranks hold anyway. What
was measured is in the checkpoint, each rank's own. A start without a stop before it begins again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent
from allstep.handlers.named_values import saved_values
from allstep.handlers.rank_totals import sum_together


class Timer:
    """Measures the time between two events.

    Args:
        start: the event at which it starts.
        stop: the event at which it stops.
        name: of the number in `state.metrics`: seconds of one time, as the mean over times and ranks so far.
        clock: seconds that never go back.

    Attributes:
        total: seconds on this rank, of all times that have ended.
        count: how many times have ended.
        last: seconds of the last one; None before.
    """

    state_differs_by_rank = True

    def __init__(
        self,
        start: AnyEvent = Events.EPOCH_STARTED,
        stop: AnyEvent = Events.EPOCH_COMPLETED,
        *,
        name: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.start_event = start
        self.stop_event = stop
        self.name = name
        self.total = 0.0
        self.count = 0
        self.last: float | None = None
        self._clock = clock
        self._began: float | None = None
        self._so_far = 0.0  # of the present time, before it was paused
        self._of_all: dict[str, int] = {}  # ranks, as of about a window ago

    def attach(self, engine: Engine) -> Timer:
        """Measure in the runs of `engine`. Returns self."""
        engine.add_event_handler(self.start_event, self.start)
        engine.add_event_handler(self.stop_event, self.stop)
        if self.name is not None:
            sum_together(engine, self.name, ("microseconds", "count"), self._read, self._land)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)
        engine.extension.add_state(self, None if self.name is None else f"Timer {self.name}")
        return self

    @property
    def mean(self) -> float | None:
        """Seconds of one time on this rank; None before the first has ended."""
        return self.total / self.count if self.count else None

    def start(self) -> None:
        """Begin a time now."""
        self._began, self._so_far = self._clock(), 0.0

    def stop(self) -> None:
        """End the present time; nothing where none has begun."""
        if self._began is None and not self._so_far:
            return
        self.pause()
        self.last, self._so_far = self._so_far, 0.0
        self.total += self.last
        self.count += 1

    def pause(self) -> None:
        """Leave out what follows, until `resume`."""
        if self._began is not None:
            self._so_far += self._clock() - self._began
            self._began = None

    def resume(self) -> None:
        """Measure again."""
        if self._began is None:
            self._began = self._clock()

    def _read(self) -> dict[str, int]:
        return {"microseconds": round(self.total * 1e6), "count": self.count}

    def _land(self, totals: dict[str, int]) -> None:
        self._of_all = totals

    def _report(self, engine: Engine) -> None:
        if self.name is not None and self._of_all.get("count"):
            engine.state.metrics[self.name] = self._of_all["microseconds"] / 1e6 / self._of_all["count"]

    def state_dict(self) -> dict[str, Any]:
        """What has ended on this rank."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError when a key is missing."""
        total, count = saved_values(self, state_dict, "total", "count")
        self.total, self.count = float(total), int(count)
