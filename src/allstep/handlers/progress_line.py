"""What a progress bar's line says: a run's progress, how fast it goes and its numbers, laid out by tqdm.

Contract: pure functions of where a run is and of its numbers. A line for so many columns is not longer than they are:
numbers that do not fit are left out whole. What can go wrong: tqdm is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allstep.engine import Engine
from allstep.errors import MissingExtraError
from allstep.handlers.progress_screens import can_draw_blocks

_BAR_COLUMNS = 10  # below this width of the bar, numbers are left out rather than cut
_AS_LOG_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_AS_LEFT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


@dataclass(frozen=True)
class EpochProgress:
    """Where a run is in its epoch.

    Attributes:
        title: of the epoch.
        done: iterations of the epoch.
        whole: how many it has; None while unknown.
        began_at: how many were done when `seconds` began, where a run goes on inside an epoch.
        seconds: since then.
        rate: iterations a second at present; None for those since then.
    """

    title: str
    done: int
    whole: int | None
    began_at: int
    seconds: float
    rate: float | None = None

    @classmethod
    def of(cls, engine: Engine, began_at: int, seconds: float, rate: float | None = None) -> EpochProgress:
        """The progress of an engine's run, of which iterations from `began_at` on, in the whole run, took `seconds`."""
        state, extension = engine.state, engine.extension
        first = extension.epoch_began_at if extension.epoch_is_open else began_at
        last = extension.epoch_ends_at if extension.epoch_is_open else state.iteration
        of = f"/{state.max_epochs}" if state.max_epochs is not None else ""
        title = engine.name if extension.is_nested else f"epoch {state.epoch}{of}"
        whole = None if last == math.inf else int(last - first)
        return cls(title, state.iteration - first, whole, began_at - first, seconds, rate)


def line_of(progress: EpochProgress, numbers: Mapping[str, float], columns: int | None) -> str:
    """The line of an epoch that goes on: with a bar for so many columns, as a line of a log for None."""
    shown = _shown(numbers)
    if columns is None:
        return _laid_out(progress, shown, bar_format=_AS_LOG_LINE if progress.whole is not None else None)
    while shown and len(_laid_out(progress, shown, bar_format="{l_bar}{r_bar}")) > columns - _BAR_COLUMNS:
        shown.pop()
    return _laid_out(progress, shown, ncols=columns)


def line_left(progress: EpochProgress, numbers: Mapping[str, float]) -> str:
    """The line that an epoch leaves."""
    return _laid_out(progress, _shown(numbers), bar_format=_AS_LEFT)


def summary_of(how: str, iterations: int, seconds: float, numbers: Mapping[str, float]) -> str:
    """The line that a run leaves: how it ended, how long its iterations took, and its numbers."""
    took = f"{iterations} iterations in {tqdm().format_interval(seconds)}, {iterations / max(seconds, 1e-9):.4g} it/s"
    return ", ".join([how, took, *_shown(numbers)])


def tqdm() -> Any:
    """tqdm's class, which lays a line out.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from tqdm import tqdm as layout
    except ImportError as error:
        raise MissingExtraError("ProgressBar needs tqdm: pip install 'allstep[progress]'") from error
    return layout


def _shown(numbers: Mapping[str, float]) -> list[str]:
    return [f"{name}={value:.4g}" for name, value in numbers.items()]


def _laid_out(progress: EpochProgress, shown: list[str], **layout: Any) -> str:
    text = tqdm().format_meter(
        n=progress.done,
        total=progress.whole,
        elapsed=progress.seconds,
        initial=progress.began_at,
        prefix=progress.title,
        rate=progress.rate,
        postfix=", ".join(shown),
        ascii=not can_draw_blocks(),
        **layout,
    )
    return str(text)
