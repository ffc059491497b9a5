"""`ProgressBar`: how far a run is, how fast it goes and what its numbers are, on one line that the main rank shows.

Contract: attached on every rank alike, to any engine. The main rank draws; the others do nothing. The line has the
epoch, iterations, the time they took and will take, and numbers: those in `state.metrics`, which are of all ranks, and
those of this rank's last output. It is drawn some ten times a second, never in each iteration, so it costs the loop
nothing; an output on a device is waited for only then. Each epoch that took a second leaves its line, and the run
leaves one that sums it up. A run inside another engine's, such as an evaluation, shows its line meanwhile and leaves
none. What can go wrong: a function for outputs that raises, as any handler.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from allstep.engine import Engine, Events, RemovableEventHandle
from allstep.engine.events import FilteredEvent, check_function
from allstep.errors import ArgumentError
from allstep.handlers.curve import ExponentialAverage
from allstep.handlers.named_values import single_numbers
from allstep.handlers.pace import Pace
from allstep.handlers.progress_line import EpochProgress, line_left, line_of, summary_of, tqdm
from allstep.handlers.progress_screens import ProgressScreen, choose_screen
from allstep.world import World

_SHORT_EPOCH_S = 1.0  # an epoch that took less leaves a line only when none was left for as long
_NEWEST = 0.3  # how much the newest interval counts in the rate


class ProgressBar:
    """Shows the progress of an engine's runs.

    Args:
        metrics: names of results in `state.metrics` to show, or "all" of those that are single numbers.
        output: `output -> number or mapping of numbers`, of the main rank's last output; None for nothing of it. By
            default the output where it is a number, and the numbers among its values where it is a mapping.
        log_seconds: between lines where there is no terminal, as in a batch job.
        screen: where to draw; by default what standard error is, or the notebook.

    Raises:
        MissingExtraError: tqdm is not installed.
        ArgumentError: log_seconds is not above 0.
        ArgumentTypeError: `output` is not callable.
    """

    def __init__(
        self,
        metrics: Iterable[str] | Literal["all"] = "all",
        *,
        output: Callable[[Any], Any] | None = lambda output: output,
        log_seconds: float = 30.0,
        screen: ProgressScreen | None = None,
    ) -> None:
        if not log_seconds > 0:
            raise ArgumentError(f"log_seconds is {log_seconds!r}; it must be more than 0")
        check_function("output", output, "a step's output", optional=True)
        self.metrics = metrics if metrics == "all" else tuple(metrics)
        self.output = output
        self.log_seconds = log_seconds
        self._chosen = screen
        tqdm()  # raises where it is not installed, before a run begins
        self._handles: list[RemovableEventHandle] = []

    def attach(self, engine: Engine) -> ProgressBar:
        """Show the runs of `engine`. Returns self."""
        engine.add_event_handler(Events.STARTED, self._start)
        return self

    def _start(self, engine: Engine) -> None:
        world = World.current()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if (engine.coordinator.rank if world is None else world.rank) != 0:
            return
        self._screen = self._chosen = self._chosen or choose_screen(os.environ, log_seconds=self.log_seconds)
        self._pace = Pace(self._screen.seconds)
        self._run_began = self._line_left = time.monotonic()
        self._began_at = engine.state.iteration
        self._begin_epoch(engine)
        # Added when the run begins, so that they come after what was attached before: numbers are those of now.
        for event, handler in (
            (Events.EPOCH_STARTED, self._begin_epoch),
            (FilteredEvent(Events.ITERATION_COMPLETED, self._pace), self._draw),
            (Events.EPOCH_COMPLETED, self._end_epoch),
            (Events.COMPLETED, self._sum_up),
            (Events.INTERRUPT | Events.TERMINATE | Events.EXCEPTION_RAISED, lambda *_: self._screen.close()),
        ):
            self._handles.append(engine.add_event_handler(event, handler))

    def _begin_epoch(self, engine: Engine) -> None:
        now, iteration = time.monotonic(), engine.state.iteration
        self._epoch_began, self._epoch_from = now, iteration
        self._drawn_at, self._drawn = now, iteration
        self._rate = ExponentialAverage(1 - _NEWEST)
        self._pace.begin(iteration)

    def _draw(self, engine: Engine) -> None:
        now, iteration = time.monotonic(), engine.state.iteration
        rate = self._rate((iteration - self._drawn) / max(now - self._drawn_at, 1e-9))
        self._drawn, self._drawn_at = iteration, now
        numbers = single_numbers(self._outputs(engine)) | self._results(engine)
        progress = EpochProgress.of(engine, self._epoch_from, now - self._epoch_began, rate)
        self._screen.draw(line_of(progress, numbers, self._screen.columns))

    def _end_epoch(self, engine: Engine) -> None:
        now = time.monotonic()
        if now - max(self._epoch_began, self._line_left) >= _SHORT_EPOCH_S and not engine.extension.is_nested:
            progress = EpochProgress.of(engine, self._epoch_from, now - self._epoch_began)
            self._screen.leave(line_left(progress, self._results(engine)))
            self._line_left = now

    def _sum_up(self, engine: Engine) -> None:
        state = engine.state
        if not engine.extension.is_nested:
            ended = f"stopped by {state.stop_reason}" if state.stop_reason else "done"
            how = f"{ended}: epoch {state.epoch}, iteration {state.iteration}"
            iterations, seconds = state.iteration - self._began_at, time.monotonic() - self._run_began
            self._screen.leave(summary_of(how, iterations, seconds, self._results(engine)))
        self._screen.close()

    def _outputs(self, engine: Engine) -> Mapping[str, Any]:
        output = engine.state.output
        if self.output is None or output is None or engine.extension.is_idle:
            return {}
        given = self.output(output)
        return given if isinstance(given, Mapping) else {"output": given}

    def _results(self, engine: Engine) -> dict[str, float]:
        results = engine.state.metrics
        names = results if self.metrics == "all" else self.metrics
        return single_numbers({name: results[name] for name in names if name in results})
