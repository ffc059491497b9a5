"""`LRFinder`: a trial in which the learning rate rises, to see where the loss falls fastest and where it diverges.

After L. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3.

Contract: `run` is called before the run that is meant, on every rank, with the engine that trains and its data. The
trial leaves no trace; see `trial`. All ranks take the same steps: where the loss of one of them diverges, it ends the
trial of all. Losses are gathered once, at the end, so that all ranks return the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from allstep.engine import Engine, Events
from allstep.engine.events import is_count
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.handlers.curve import curve_svg
from allstep.handlers.trial import trial_engine, without_effect


@dataclass(frozen=True)
class LRCurve:
    """The loss by learning rate. In a notebook it shows itself as a picture.

    Attributes:
        rates: of the optimizer's first parameter group, at each step.
        losses: means over the samples of all ranks.
        smoothed: the same, smoothed.
        suggestion: the rate at which the smoothed loss falls fastest; None where it never falls.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None

    def svg(self) -> str:
        """The picture, as SVG; the suggestion is marked."""
        return curve_svg(
            self.rates, self.smoothed, x_label="learning rate", y_label="loss", logarithmic=True, mark=self.suggestion
        )

    def save(self, path: str | Path) -> None:
        """Write the picture to an .svg file."""
        Path(path).write_text(self.svg(), encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg()


class LRFinder:
    """Finds a learning rate.

    Args:
        optimizer: whose rates are tried. Those of further parameter groups keep their ratio to the first one's.
        start: the first rate.
        end: the last rate, more than `start`; rates rise evenly in their logarithm.
        steps: optimizer steps, 2 or more.
        diverges: the trial ends where the smoothed loss is this many times the least one, or not finite.
        smoothing: how much of the smoothed loss stays at each step, from 0 to less than 1.
        loss: `output -> loss` of a step; by default the output itself, or its entry "loss".

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        start: float = 1e-7,
        end: float = 10.0,
        steps: int = 100,
        diverges: float = 4.0,
        smoothing: float = 0.9,
        loss: Callable[[Any], Any] | None = None,
    ) -> None:
        if not 0 < start < end:
            raise ArgumentError(f"start is {start!r} and end {end!r}; they must be rates, the first the smaller one")
        if not is_count(steps, least=2):
            raise ArgumentError(f"steps is {steps!r}; it must be an int of at least 2")
        if not diverges > 1:
            raise ArgumentError(f"diverges is {diverges!r}; it must be more than 1")
        if not 0 <= smoothing < 1:
            raise ArgumentError(f"smoothing is {smoothing!r}; it must be from 0 to less than 1")
        self.optimizer = optimizer
        self.start = start
        self.end = end
        self.steps = steps
        self.diverges = diverges
        self.smoothing = smoothing
        self.loss = _loss_of if loss is None else loss

    def run(self, trainer: Engine, data: Any) -> LRCurve:
        """Try the trainer's step over `data`, which is begun again where it is too short.

        Raises:
            ArgumentError: data can be read only once, or the trainer knows no module that it trains.
            ArgumentTypeError: a step's output has no loss, or trainer is no engine.
        """
        engine = trial_engine(trainer, "learning rate finder")
        with without_effect(trainer, self.optimizer, data):
            own = _Losses(self)
            own.attach(engine)
            # With a window of 1 a rank whose loss diverges ends the trial at once.
            engine.run(data, max_iters=self.steps * trainer.accumulate, window=1)
        said: list[list[tuple[float, int]]] = engine.coordinator.gather(own.sums)
        losses = [
            sum(total for total, _ in of_step) / max(1, sum(samples for _, samples in of_step))
            for of_step in zip(*said, strict=True)
        ]
        rates = [self.rate(step) for step in range(len(losses))]
        smoothed = _smoothed(losses, self.smoothing)
        return LRCurve(tuple(rates), tuple(losses), tuple(smoothed), _steepest(rates, smoothed))

    def rate(self, step: int) -> float:
        """The rate of the first parameter group in a step, from 0."""
        return float(self.start * (self.end / self.start) ** (step / (self.steps - 1)))


class _Losses:
    """What one rank sees: for each optimizer step the sum of losses over its samples, and how many these are."""

    def __init__(self, finder: LRFinder) -> None:
        self._finder = finder
        self._groups = finder.optimizer.param_groups
        first = float(self._groups[0]["lr"]) or 1.0
        self._ratios = [float(group["lr"]) / first for group in self._groups]
        self._smooth, self._least = _Smooth(finder.smoothing), math.inf
        self._total, self._samples = 0.0, 0
        self.sums: list[tuple[float, int]] = []

    def attach(self, engine: Engine) -> None:
        engine.extension.count_samples()
        engine.add_event_handler(Events.STARTED, self._set_rates)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)

    def _set_rates(self) -> None:
        rate = self._finder.rate(len(self.sums))
        for group, ratio in zip(self._groups, self._ratios, strict=True):
            value = group["lr"]
            if isinstance(value, torch.Tensor):
                value.fill_(rate * ratio)
            else:
                group["lr"] = rate * ratio

    def _note(self, engine: Engine) -> None:
        if not engine.extension.is_idle:
            samples = engine.extension.samples_in_batch()
            self._total += float(self._finder.loss(engine.state.output)) * samples
            self._samples += samples
        if not engine.state.group_end:
            return
        self.sums.append((self._total, self._samples))
        if self._samples:
            smoothed = self._smooth(self._total / self._samples)
            self._least = min(self._least, smoothed)
            if not math.isfinite(smoothed) or smoothed > self._finder.diverges * self._least:
                engine.terminate(reason="the loss diverges")
        self._total, self._samples = 0.0, 0
        self._set_rates()
        if len(self.sums) == self._finder.steps:  # on all ranks at once; before, where short epochs cut groups short
            engine.terminate(agreed=True)


class _Smooth:
    """An exponential average that is not drawn to its beginning."""

    def __init__(self, stays: float) -> None:
        self._stays = stays
        self._average, self._weight = 0.0, 0.0

    def __call__(self, value: float) -> float:
        self._average = self._stays * self._average + (1 - self._stays) * value
        self._weight = self._stays * self._weight + (1 - self._stays)
        return self._average / self._weight


def _smoothed(values: list[float], stays: float) -> list[float]:
    smooth = _Smooth(stays)
    return [smooth(value) for value in values]


def _steepest(rates: list[float], losses: list[float]) -> float | None:
    """The rate at which losses fall fastest by the rate's logarithm, before they are least."""
    finite = [each if math.isfinite(each) else math.inf for each in losses]
    least = finite.index(min(finite, default=math.inf)) if finite else 0
    slopes = {
        (finite[at + 1] - finite[at]) / math.log(rates[at + 1] / rates[at]): rates[at]
        for at in range(least)
        if math.isfinite(finite[at])
    }
    steepest = min(slopes, default=0.0)
    return slopes[steepest] if steepest < 0 else None


def _loss_of(output: Any) -> Any:
    value = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(value, float | int) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
        raise ArgumentTypeError(
            f"a step's output is a {type(output).__name__}, in which the loss is not known; give "
            "LRFinder(loss=output -> loss)"
        )
    return value
