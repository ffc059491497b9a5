"""`BatchSizeFinder`: trials with larger and larger batches, to see which fit into memory and which are fastest.

Contract: `run` is called before the run that is meant, on every rank, with the engine that trains. It leaves no trace;
see `trial`. Sizes are doubled until one is too large on some rank, and those between are halved then. In a trial each
rank makes steps alone, without reducing gradients, since one that runs out of memory would leave the others waiting.
Behind each trial the ranks say how it went, in one collective, so that all try the same sizes and return the same. A
batch does not fit where the step, or reading it, runs out of memory. What can go wrong: a step with collectives of its
own, such as SyncBatchNorm's, cannot be tried so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from allstep.coordination import Alone
from allstep.engine import Engine, Events
from allstep.engine.events import is_count
from allstep.errors import ArgumentError, EngineError
from allstep.handlers.curve import curve_svg
from allstep.handlers.trial import Step, trained_modules, trial_engine, without_effect

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


@dataclass(frozen=True)
class BatchSizes:
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

    def save(self, path: str | Path) -> None:
        """Write the picture to an .svg file."""
        Path(path).write_text(self.svg(), encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg()


@dataclass(frozen=True, slots=True)
class _Trial:
    """A trial that fitted: samples and seconds behind its first iteration, and whether data had so many batches."""

    samples: int = 0
    seconds: float = 1e-9
    has_more: bool = True


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
        for name, value, least in (
            ("start", start, 1),
            ("most", most, 1),
            ("steps", steps, 2),
            ("halvings", halvings, 0),
        ):
            if not is_count(value, least=least):
                raise ArgumentError(f"{name} is {value!r}; it must be an int of at least {least}")
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
            ArgumentError: the trainer knows no module that it trains.
            EngineError: not even the first size fits on all ranks.
        """
        timing = _Timing()
        engine = trial_engine(trainer, "batch size finder", Alone(), timing.around)
        timing.attach(engine)
        throughput: dict[int, float] = {}
        too_large: int | None = None
        size: int | None = self.start
        halvings = 0
        with without_effect(trainer, self.optimizer), _apart(trainer):
            while size is not None:
                self._try(engine, data, size, timing)
                said = trainer.coordinator.gather(timing.result)
                _free(engine)
                fits = [each is not None for each in said]
                if all(fits):
                    throughput[size] = sum(each.samples for each in said) / max(each.seconds for each in said)
                elif not throughput:
                    raise EngineError(
                        f"a batch of {size} does not fit into memory on rank {fits.index(False)}, and it is the first "
                        "that was tried; begin with a smaller start, or make the model smaller"
                    )
                else:
                    too_large = size
                largest, halvings = max(throughput), halvings + (too_large is not None)
                if all(fits) and not all(each.has_more for each in said):
                    size = None
                elif too_large is None:
                    size = min(2 * largest, self.most) if largest < self.most else None
                else:
                    middle = (largest + too_large) // 2
                    size = middle if halvings <= self.halvings and middle > largest else None
        return BatchSizes(throughput, too_large)

    def _try(self, engine: Engine, data: Callable[[int], Iterable[Any]], size: int, timing: _Timing) -> None:
        try:
            engine.run(data(size), max_iters=self.steps * engine.accumulate)
        except Exception as error:  # of making or reading the data: the step's own does not come so far
            if not _is_out_of_memory(error):
                raise
            timing.result = None


class _Timing:
    """Times the iterations of a trial on this rank alone, behind the first one, and notes whether one did not fit.

    Attributes:
        result: of the trial that has ended; None where a batch did not fit.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self.result: _Trial | None = None

    def around(self, step: Step) -> Step:
        """The step; where it runs out of memory the trial ends, and nothing is raised."""

        def tried(engine: Engine, batch: Any) -> Any:
            try:
                return step(engine, batch)
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                self.result = None
                engine.terminate(reason="out of memory")

        return tried

    def attach(self, engine: Engine) -> None:
        engine.extension.count_samples()
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)

    def _start(self) -> None:
        self.result = _Trial()

    def _note(self, engine: Engine) -> None:
        if self.result is None:
            return
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        now = time.perf_counter()
        if engine.state.iteration == 1:
            self._began = now
            return
        samples = self.result.samples + engine.extension.samples_in_batch()
        self.result = _Trial(samples, max(now - self._began, 1e-9), has_more=engine.state.epoch == 1)


@contextmanager
def _apart(trainer: Engine) -> Iterator[None]:
    """Have forward and backward passes of modules in DDP wait for no other rank."""
    wrapped = [each for each in trained_modules(trainer) if isinstance(each, DistributedDataParallel)]
    before = [(each.require_backward_grad_sync, each.require_forward_param_sync) for each in wrapped]
    for each in wrapped:
        each.require_backward_grad_sync = each.require_forward_param_sync = False
    try:
        yield
    finally:
        for each, (backward, forward) in zip(wrapped, before, strict=True):
            each.require_backward_grad_sync, each.require_forward_param_sync = backward, forward


def _free(engine: Engine) -> None:
    """Let go of what the trial holds, so that the next one has all memory."""
    engine.state.batch = engine.state.output = engine.state.dataloader = None
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)
