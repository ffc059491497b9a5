"""`LRFinder`: a trial in which the learning rate rises, to see where the loss falls fastest and where it diverges.

After L. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3.

Contract: `run` is called before the run that is meant, on every rank, with the engine that trains and its data. The
trial leaves no trace; see `trial`. All ranks take the same steps: where the loss of one of them diverges, it ends the
trial of all. Losses are gathered once, at the end, so that all ranks return the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from allstep.engine import Engine, Events
from allstep.engine.events import check_count
from allstep.engine.state import is_one_number
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.handlers.curve import CurvePicture, ExponentialAverage, curve_svg, steepest_fall
from allstep.handlers.trial import trial_engine, without_effect


@dataclass(frozen=True)
class LRCurve(CurvePicture):
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

    @classmethod
    def of(cls, rates: Sequence[float], losses: Sequence[float], smoothing: float) -> LRCurve:
        """The curve through rates and losses; `smoothing` is how much of the smoothed loss stays at each step."""
        smoothed = list(map(ExponentialAverage(smoothing), losses))
        return cls(tuple(rates), tuple(losses), tuple(smoothed), steepest_fall(rates, smoothed))

    def svg(self) -> str:
        """The picture, as SVG; the suggestion is marked."""
        return curve_svg(
            self.rates, self.smoothed, x_label="learning rate", y_label="loss", logarithmic=True, mark=self.suggestion
        )


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
        check_count("steps", steps, 2)
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
            own = _Losses(self).attach(engine)
            # With a window of 1 a rank whose loss diverges ends the trial at once.
            engine.run(data, max_iters=self.steps * trainer.accumulate, window=1)
        sums = torch.tensor(engine.coordinator.gather(own.sums), dtype=torch.float64).sum(dim=0)  # steps x 2
        losses = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        return LRCurve.of([self.rate(step) for step in range(len(losses))], losses, self.smoothing)

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
        self._smooth, self._least = ExponentialAverage(finder.smoothing), math.inf
        self._total, self._samples = 0.0, 0
        self.sums: list[tuple[float, int]] = []

    def attach(self, engine: Engine) -> _Losses:
        engine.add_event_handler(Events.STARTED, self._set_rates)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        return self

    def _set_rates(self) -> None:
        rate = self._finder.rate(len(self.sums))
        for group, ratio in zip(self._groups, self._ratios, strict=True):
            lr = group["lr"]
            group["lr"] = lr.fill_(rate * ratio) if isinstance(lr, torch.Tensor) else rate * ratio

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


def _loss_of(output: Any) -> Any:
    value = output.get("loss") if isinstance(output, Mapping) else output
    if not is_one_number(value):
        raise ArgumentTypeError(
            f"a step's output is a {type(output).__name__}, in which the loss is not known; give "
            "LRFinder(loss=output -> loss)"
        )
    return value
