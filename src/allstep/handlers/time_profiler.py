"""`TimeProfiler`: where an iteration's time goes: into data, the step, the handlers of each event, or anything else.

Contract: attached on every rank alike. In the iterations that were chosen it reads the clock between parts: waiting for
a batch, the step, and each event's handlers, of which it is the first and the last. "other" is what is left: the loop,
votes, and handlers that come to an event after the run's first epoch has started. Handlers of OPTIMIZER_STEP_COMPLETED
are part of ITERATION_COMPLETED, which they are called in. So the parts add up to the time that has passed.

Each rank has its own `seconds`. Sums over ranks ride in the votes that ranks hold anyway, and `over_ranks` has the mean
over the ranks from each epoch's end on. Outside the chosen iterations it costs nothing; inside, a few microseconds an
iteration. A device works on after a step has returned. `synchronize` waits for it, so that its time counts as the
step's; without, it counts where the host waits next. What can go wrong: nothing of its own.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent, EveryFilter, FilteredEvent
from allstep.errors import ArgumentError
from allstep.handlers.rank_totals import sum_together

_PER_ITERATION = (
    *(Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED),
    *(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED),
)
_PER_EPOCH = (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
_COUNTED_BEFORE = {Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED}
_BEGIN = {Events.GET_BATCH_STARTED, Events.ITERATION_STARTED}  # the first of an iteration, with data or without
_THEN = {Events.GET_BATCH_STARTED: "data", Events.ITERATION_STARTED: "step"}
_SUMMED = ("data", "step", "handlers", "other")


class TimeProfiler:
    """Measures the parts of iterations.

    Args:
        iterations: which, counted over the whole run and from 1, as `range(101, 201)`; by default all.
        synchronize: wait for the device at each reading of the clock.

    Attributes:
        seconds: of this rank: "data", "step", "handlers of EVENT" for each event, "other".
        iterations_done: how many were measured.
        over_ranks: "data", "step", "handlers" and "other", the mean over the ranks, as of the last epoch's end.

    Raises:
        ArgumentError: iterations is no range of numbers from 1 on with step 1.
    """

    def __init__(self, iterations: range | None = None, *, synchronize: bool = False) -> None:
        if iterations is not None and (iterations.step != 1 or iterations.start < 1 or not iterations):
            raise ArgumentError(
                f"iterations is {iterations!r}; it must be a range from 1 or later, such as range(1, 101)"
            )
        self.iterations = iterations
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}
        self.over_ranks: dict[str, float] = {}
        self.iterations_done = 0

    def attach(self, engine: Engine) -> TimeProfiler:
        """Measure the runs of `engine`, each anew. Returns self."""
        engine.add_event_handler(Events.STARTED, self._start)
        # Behind the beginning of the run, at which other handlers still add what they do in it.
        engine.add_event_handler(Events.EPOCH_STARTED, self._surround)
        sum_together(engine, "TimeProfiler, in microseconds", _SUMMED, self._read, self._land)
        return self

    def report(self) -> str:
        """A table: this rank's seconds, their share, and the mean over the ranks where that is known."""
        whole = sum(self.seconds.values()) or 1.0
        lines = [f"{'part':32}{'seconds':>10}{'share':>8}{'ms/iteration':>14}{'mean of ranks, s':>18}"]
        for part, seconds in self.seconds.items():
            mean = f"{self.over_ranks[part]:18.3f}" if part in self.over_ranks else ""
            each = 1e3 * seconds / max(1, self.iterations_done)
            lines.append(f"{part:32}{seconds:10.3f}{seconds / whole:8.1%}{each:14.3f}{mean}")
        return "\n".join(lines)

    def _start(self, engine: Engine) -> None:
        self.seconds = {"data": 0.0, "step": 0.0, "other": 0.0}
        self.over_ranks = {}
        self.iterations_done = 0
        self._part: str | None = None  # where the time goes now; None outside the chosen iterations
        self._since = 0.0
        self._world_size = engine.coordinator.world_size
        self._is_around = False

    def _surround(self, engine: Engine) -> None:
        if self._is_around:
            return
        self._is_around = True
        for event in (*_PER_ITERATION, *_PER_EPOCH):
            engine.extension.surround(self._chosen(event), partial(self._before, event), partial(self._after, event))

    def _chosen(self, event: Events) -> AnyEvent:
        if self.iterations is None or event in _PER_EPOCH:
            return event
        less = event in _COUNTED_BEFORE
        first, last = self.iterations.start - less, self.iterations[-1] - less
        return FilteredEvent(event, EveryFilter(1, after=first - 1, before=last + 1))

    def _before(self, event: Events) -> None:
        if self._part is not None or event in _BEGIN:
            self._switch(f"handlers of {event.name}")

    def _after(self, event: Events) -> None:
        if self._part is None:
            return
        self._switch(_THEN.get(event, "other"))
        if event is Events.ITERATION_COMPLETED:
            self.iterations_done += 1
            if self.iterations is not None and self.iterations_done == len(self.iterations):
                self._part = None

    def _switch(self, part: str) -> None:
        """What happens from now on belongs to this part."""
        if self.synchronize and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._part is not None:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def _read(self) -> dict[str, int]:
        handlers = sum(each for name, each in self.seconds.items() if name.startswith("handlers"))
        return {part: round(1e6 * each) for part, each in {**self.seconds, "handlers": handlers}.items()}

    def _land(self, totals: dict[str, int]) -> None:
        self.over_ranks = {part: total / 1e6 / self._world_size for part, total in totals.items()}
