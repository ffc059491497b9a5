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
from allstep.engine.events import FilteredEvent
from allstep.errors import ArgumentError, ArgumentTypeError, MissingExtraError
from allstep.handlers.pace import Pace
from allstep.handlers.progress_screens import ProgressScreen, can_draw_blocks, choose_screen
from allstep.world import World

_SHORT_EPOCH_S = 1.0  # an epoch that took less leaves a line only when none was left for as long
_BAR_COLUMNS = 10  # below this width of the bar, numbers are left out rather than cut
_AS_LOG_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_AS_LEFT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"
_SMOOTHING = 0.3  # how much the newest interval counts in the rate


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
        if output is not None and not callable(output):
            raise ArgumentTypeError(f"output is {output!r}; it must be a function of a step's output, or None")
        self.metrics = metrics if metrics == "all" else tuple(metrics)
        self.output = output
        self.log_seconds = log_seconds
        self._given_screen: ProgressScreen | None = screen
        self._format = _layout()
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
        if self._given_screen is None:
            self._given_screen = choose_screen(os.environ, log_seconds=self.log_seconds)
        self._screen = self._given_screen
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
            (Events.INTERRUPT | Events.TERMINATE | Events.EXCEPTION_RAISED, self._hide),
        ):
            self._handles.append(engine.add_event_handler(event, handler))

    def _begin_epoch(self, engine: Engine) -> None:
        now = time.monotonic()
        self._epoch_began = self._drawn_at = now
        self._epoch_from = self._drawn = engine.state.iteration
        self._rate: float | None = None
        self._pace.begin(engine.state.iteration)

    def _draw(self, engine: Engine) -> None:
        now, iteration = time.monotonic(), engine.state.iteration
        rate = (iteration - self._drawn) / max(now - self._drawn_at, 1e-9)
        self._rate = rate if self._rate is None else _SMOOTHING * rate + (1 - _SMOOTHING) * self._rate
        self._drawn, self._drawn_at = iteration, now
        self._screen.draw(self._line(engine, now))

    def _end_epoch(self, engine: Engine) -> None:
        now = time.monotonic()
        if now - max(self._epoch_began, self._line_left) >= _SHORT_EPOCH_S and not engine.extension.is_nested:
            self._rate = (engine.state.iteration - self._epoch_from) / max(now - self._epoch_began, 1e-9)
            self._screen.leave(self._line(engine, now, has_ended=True))
            self._line_left = now

    def _sum_up(self, engine: Engine) -> None:
        if engine.extension.is_nested:
            self._screen.close()
            return
        state, seconds = engine.state, time.monotonic() - self._run_began
        iterations = state.iteration - self._began_at
        ended = f"stopped by {state.stop_reason}" if state.stop_reason else "done"
        text = (
            f"{ended}: epoch {state.epoch}, iteration {state.iteration}, {iterations} iterations in "
            f"{self._format.format_interval(seconds)}, {iterations / max(seconds, 1e-9):.4g} it/s"
        )
        self._screen.leave(", ".join([text, *_shown(self._numbers(engine, has_ended=True))]))
        self._screen.close()

    def _hide(self, engine: Engine) -> None:
        self._screen.close()

    def _line(self, engine: Engine, now: float, *, has_ended: bool = False) -> str:
        state, columns = engine.state, self._screen.columns
        began_at = engine.extension.epoch_began_at if engine.extension.epoch_is_open else self._epoch_from
        ends_at = engine.extension.epoch_ends_at if engine.extension.epoch_is_open else state.iteration
        whole = None if ends_at == float("inf") else int(ends_at - began_at)
        shown = _shown(self._numbers(engine, has_ended=has_ended))
        of = f"/{state.max_epochs}" if state.max_epochs is not None else ""
        arguments: dict[str, Any] = {
            "n": state.iteration - began_at,
            "total": whole,
            "elapsed": now - self._epoch_began,
            "initial": self._epoch_from - began_at,  # where a run goes on inside an epoch
            "prefix": engine.name if engine.extension.is_nested else f"epoch {state.epoch}{of}",
            "rate": self._rate,
            "ascii": not can_draw_blocks(),
        }
        if has_ended:
            return self._text(arguments, shown, bar_format=_AS_LEFT)
        if columns is None:
            return self._text(arguments, shown, bar_format=_AS_LOG_LINE if whole is not None else None)
        while shown and len(self._text(arguments, shown, bar_format="{l_bar}{r_bar}")) > columns - _BAR_COLUMNS:
            shown.pop()
        return self._text(arguments, shown, ncols=columns)

    def _text(self, arguments: Mapping[str, Any], shown: list[str], **layout: Any) -> str:
        return str(self._format.format_meter(**arguments, postfix=", ".join(shown), **layout))

    def _numbers(self, engine: Engine, *, has_ended: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        output = engine.state.output
        # The last output says little of an epoch.
        if not has_ended and self.output is not None and output is not None and not engine.extension.is_idle:
            given = self.output(output)
            found = dict(given) if isinstance(given, Mapping) else {"output": given}
        # Of two numbers of one name, that of all ranks is shown.
        results = engine.state.metrics
        return found | {
            name: results[name] for name in (results if self.metrics == "all" else self.metrics) if name in results
        }


def _shown(numbers: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value:.4g}" for name, given in numbers.items() if (value := _as_float(given)) is not None]


def _as_float(value: Any) -> float | None:
    """A single number; None for anything else, and for text that would be read as one."""
    if isinstance(value, str | bytes) or value is None:
        return None
    if hasattr(value, "numel"):
        return float(value) if value.numel() == 1 else None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _layout() -> Any:
    """tqdm, for how a line is laid out."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingExtraError("ProgressBar needs tqdm: pip install 'allstep[progress]'") from error
    return tqdm
