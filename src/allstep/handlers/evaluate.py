"""`Evaluate`: runs an evaluator over its data every so often, at the same iteration on all ranks.

Contract: attached to the engine that trains, on every rank alike. Iterations and epochs are counted alike everywhere.
Clocks are not, so where the time decides it is rank 0's, and what it says rides in the votes that ranks hold anyway:
one to two windows later all ranks evaluate after the same iteration. No collective is added but the evaluation's own.

The evaluator's results are in the trainer's `state.metrics` afterwards, under a prefix, for progress bars, checkpoints
and schedules. What a run trained since its last evaluation is evaluated at its end, unless it was broken off. What can
go wrong: the evaluator raises, which ends the run as an exception of any handler.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from allstep.checkpoint.save_schedule import SaveEvery, SaveTimes, read_every
from allstep.engine import Engine, Events
from allstep.engine.events import FilteredEvent
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.handlers.pace import Pace


class Evaluate:
    """Evaluates in the course of a training run.

    Args:
        evaluator: the engine to run.
        data: its batches; read from the beginning each time.
        every: iterations as an int, a timedelta, a text such as "epoch", "500 iterations" or "10 minutes", or several
            of these in a tuple.
        prefix: what stands before the names of the results in the trainer's `state.metrics`.
        clock: seconds that never go back.

    Raises:
        ArgumentError: `every` has no such value, or is empty.
        ArgumentTypeError: evaluator is no Engine.
    """

    def __init__(
        self,
        evaluator: Engine,
        data: Any,
        *,
        every: SaveEvery | Sequence[SaveEvery] = "epoch",
        prefix: str = "val/",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(evaluator, Engine):
            raise ArgumentTypeError(f"evaluator is {evaluator!r}; it must be the Engine to run")
        self._times = read_every(every)
        if self._times == SaveTimes():
            raise ArgumentError(f'every is {every!r}; give iterations as an int, or a text such as "epoch"')
        self.evaluator = evaluator
        self.data = data
        self.prefix = prefix
        self._clock = clock
        self._evaluated_at = 0  # the iteration

    def attach(self, engine: Engine) -> Evaluate:
        """Evaluate in the runs of `engine`, the trainer. Returns self."""
        times = self._times
        engine.add_event_handler(Events.STARTED, self._start)
        if times.iterations is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=times.iterations), self._evaluate)
        if times.epochs is not None:
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=times.epochs), self._evaluate)
        if times.seconds is not None:
            self._attach_to_clock(engine, times.seconds)
        engine.add_event_handler(Events.COMPLETED, self._evaluate_at_end)
        return self

    def _attach_to_clock(self, engine: Engine, seconds: float) -> None:
        if engine.coordinator.world_size == 1:
            alone = Pace(seconds, clock=self._clock)
            engine.add_event_handler(Events.STARTED, lambda: alone.begin(engine.state.iteration))
            engine.add_event_handler(FilteredEvent(Events.ITERATION_COMPLETED, alone), self._evaluate)
            return
        agreed = _AgreedClock(engine, seconds, self._clock)
        engine.add_event_handler(Events.STARTED, agreed.begin)

        def evaluate(engine: Engine) -> None:
            self._evaluate(engine)
            agreed.begin()

        engine.add_event_handler(FilteredEvent(Events.ITERATION_COMPLETED, agreed), evaluate)

    def _start(self, engine: Engine) -> None:
        self._evaluated_at = engine.state.iteration

    def _evaluate(self, engine: Engine) -> None:
        iteration = engine.state.iteration
        if iteration == self._evaluated_at:  # an epoch's end that is a multiple of the iterations too
            return
        self._evaluated_at = iteration
        results = self.evaluator.run(self.data).metrics
        engine.state.metrics.update({f"{self.prefix}{name}": value for name, value in results.items()})

    def _evaluate_at_end(self, engine: Engine) -> None:
        # One that was left, preempted or failed is to end soon.
        if engine.state.outcome in (None, "finished"):
            self._evaluate(engine)


class _AgreedClock:
    """A filter that lets an event through when rank 0's time is up, at the same count on all ranks."""

    def __init__(self, engine: Engine, seconds: float, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._seconds = seconds
        self._clock = clock
        self._due: float = math.inf
        self._asks_at = math.inf
        engine.extension.sum_over_ranks(f"whether {seconds:g} s have passed", self._read, self._land)

    def begin(self) -> None:
        """Begin an interval now."""
        self._due, self._asks_at = math.inf, self._clock() + self._seconds

    def matches(self, engine: Any, count: int) -> bool:
        """Whether all ranks know that the time is up."""
        return count >= self._due

    def next_due(self, count: int) -> float:
        """The count after that at which they came to know it."""
        return max(count, self._due)

    def _read(self) -> int:
        """What this rank says in a vote: 1 when it is rank 0's to say that the time is up, once an interval."""
        if self._engine.coordinator.rank or self._clock() < self._asks_at:
            return 0
        self._asks_at = math.inf
        return 1

    def _land(self, total: int) -> None:
        if total:
            self._due = self._engine.state.iteration + 1
            self._engine.extension.reschedule()
