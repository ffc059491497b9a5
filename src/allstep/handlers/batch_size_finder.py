"""`BatchSizeFinder`: trials with larger and larger batches, to see which fit into memory and which are fastest.

Contract: `run` is called before the run that is meant, on every rank, with the engine that trains. It leaves no trace;
see `trial`. Sizes are doubled until one is too large on some rank, and those between are halved then. In a trial each
rank makes steps alone, without reducing gradients, since one that runs out of memory would leave the others waiting.
Behind each trial the ranks say how it went, in one collective, so that all try the same sizes and return the same. A
batch does not fit where the step, or reading it, runs out of memory. What can go wrong: a step with collectives of its
own, such as SyncBatchNorm's, cannot be tried so; that of a model that is sharded over ranks is refused.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from allstep.coordination import Alone
from allstep.engine import Engine, Events
from allstep.engine.events import check_count
from allstep.errors import ArgumentError, EngineError
from allstep.handlers.curve import CurvePicture, curve_svg
from allstep.handlers.trial import SizeSearch, Step, steps_alone, trial_engine, without_effect
from allstep.monitor.memory import is_out_of_memory


@dataclass(frozen=True)
class BatchSizes(CurvePicture):
    """What became of each size that was tried. In a notebook it shows itself as a picture.

    Attributes:
        throughput: samples a second of all ranks, by batch size of a rank, of those that fit on every rank.
        too_large: the smallest size that was tried and did not fit on some rank; None where all did.
    """

    throughput: dict[int, float]
    too_large: int | None

    @property
    def largest(self) -> int:
        """The largest size that fits on every rank."""
        return max(self.throughput)

    @property
    def fastest(self) -> int:
        """The size with most samples a second."""
        return max(self.throughput, key=self.throughput.__getitem__)

    def svg(self) -> str:
        """The picture, as SVG; the fastest size is marked."""
        sizes = sorted(self.throughput)
        rates = [self.throughput[size] for size in sizes]
        labels = {"x_label": "samples of a rank in a batch", "y_label": "samples a second"}
        return curve_svg(sizes, rates, **labels, logarithmic=True, mark=self.fastest)


class BatchSizeFinder:
    """Finds the largest batch that fits into memory on all ranks.

    Args:
        optimizer: that the step uses.
        start: the first size, in samples of one rank.
        most: no larger size is tried.
        steps: optimizer steps in a trial, 2 or more; the first of them is not timed.
        halvings: how often the gap between the largest size that fits and the smallest that does not is halved.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, *, start: int = 1, most: int = 65536, steps: int = 3, halvings: int = 3
    ) -> None:
        check_count("start", start, 1)
        check_count("most", most, 1)
        check_count("steps", steps, 2)
        check_count("halvings", halvings, 0)
        if start > most:
            raise ArgumentError(f"start is {start} and most {most}; start must not be larger")
        self.optimizer = optimizer
        self.start = start
        self.most = most
        self.steps = steps
        self.halvings = halvings

    def run(self, trainer: Engine, data: Callable[[int], Iterable[Any]]) -> BatchSizes:
        """Try the trainer's step.

        Args:
            trainer: the engine that trains.
            data: gives batches of so many samples, such as `lambda size: world.loader(dataset, batch_size=size)`.

        Raises:
            ArgumentError: the trainer knows no module that it trains, or one is sharded over ranks.
            EngineError: not even the first size fits on all ranks.
        """
        trial = _Trial(trainer)
        throughput: dict[int, float] = {}
        search = SizeSearch(self.start, self.most, self.halvings)
        with without_effect(trainer, self.optimizer), steps_alone(trainer):
            while (size := search.size) is not None:
                said = trainer.coordinator.gather(trial.of(data, size, self.steps))
                if None not in said:
                    throughput[size] = sum(each.samples for each in said) / max(each.seconds for each in said)
                elif not throughput:
                    raise EngineError(
                        f"a batch of {size} does not fit into memory on rank {said.index(None)}, and it is the first "
                        "that was tried; begin with a smaller start, or make the model smaller"
                    )
                search.note(size, None not in said, is_last=not all(each and each.has_more for each in said))
        return BatchSizes(throughput, search.too_large)


@dataclass(slots=True)
class _TimedSteps:
    """A trial that fitted: samples and seconds behind its first iteration, and whether data had so many batches."""

    samples: int = 0
    seconds: float = 1e-9
    has_more: bool = True


class _Trial:
    """Steps of this rank alone with batches of one size after another."""

    def __init__(self, trainer: Engine) -> None:
        self._timed: _TimedSteps | None = None  # None where a batch did not fit
        self._began = 0.0
        self._engine = trial_engine(trainer, "batch size finder", Alone(), self._guarded)
        self._engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)

    def of(self, data: Callable[[int], Iterable[Any]], size: int, steps: int) -> _TimedSteps | None:
        """What became of a size; None where a batch of it does not fit, also while it is read."""
        engine, self._timed = self._engine, _TimedSteps()
        try:
            engine.run(data(size), max_iters=steps * engine.accumulate)
        except Exception as error:  # the step's own does not come so far
            if not is_out_of_memory(error):
                raise
            self._timed = None
        engine.state.batch = engine.state.output = engine.state.dataloader = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return self._timed

    def _guarded(self, step: Step) -> Step:
        def guarded(engine: Engine, batch: Any) -> Any:
            try:
                return step(engine, batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._timed = None
                engine.terminate(reason="out of memory")

        return guarded

    def _note(self, engine: Engine) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now, timed = time.perf_counter(), self._timed
        if engine.state.iteration == 1:
            self._began = now
        elif timed is not None:
            timed.samples += engine.extension.samples_in_batch()
            timed.seconds, timed.has_more = max(now - self._began, 1e-9), engine.state.epoch == 1
