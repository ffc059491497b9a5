"""What metrics over ranks cost: collectives, bytes and time at an epoch's end, and the time of an update.

Gloo ranks on this machine hold 1, 10 and 50 classification metrics (accuracy, precision, recall and confusion matrix of
ten classes, in turns) that have seen the same uneven batches, and bring an epoch to its end:

- allstep: the reduction of `Metrics`, everything from the states to the results;
- torchmetrics: `compute()` of each metric, which synchronises itself;
- PyTorch-Ignite: its own metrics of the same kinds, `compute()` of each;
- Lightning: `self.log(..., sync_dist=True)` of as many values, its result collection computing them; these are means
  of numbers, the only thing it can log so;
- Accelerate: `gather_for_metrics` of predictions and targets in each iteration of an epoch of 20, then torchmetrics
  without synchronisation: here time and collectives are those of the whole epoch.

Bytes are what a rank gives to its collectives and messages; each message to another rank is counted for itself. Times
are medians over repetitions that all contenders take in turns, so that a drift of the machine meets all of them. The
order is another one in each repetition, the same on all ranks: who follows upon much work begins with cold caches. A
turn begins at a barrier, and its time is the slowest rank's.
Updates are measured in a process of their own, in pairs that take turns, with the same batches: the engine's event at
which `Metrics` takes the step's output, against a loop over the same metrics' `update`; and allstep's `Mean`, for
itself and through `Metrics`, against torchmetrics' `MeanMetric`. Their ratio is the median over turns. Contenders that
are not installed are named and left out.

    pip install allstep[bench]; python benchmarks/metrics.py [--repetitions 50] [--ranks 2 4] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))

from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassPrecision,
    MulticlassRecall,
)

from allstep import Alone, Engine, Events, Mean, Metrics, World
from allstep.testing import run_ranks

from machine import machine_line

CLASSES, ROWS, BATCHES = 10, 64, 20
CALLS = 10  # of a single metric's update between two readings of the clock
COUNTS = (1, 10, 50)
AIM = 10.0
MOST_OF_AN_UPDATE = 1.1  # of the time of a loop over the metrics, whose own `update` is what is called
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
)

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Traffic:
    """What one epoch's end asked of torch.distributed."""

    collectives: int
    bytes: int


@contextlib.contextmanager
def observed() -> Iterator[list[int]]:
    """Bytes that each collective inside is given by this rank; calls made by another collective are not counted."""
    given: list[int] = []
    inside = False

    def observing(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def observe(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return call(*args, **kwargs)
            sent = next(
                (a for a in (args[1::-1] if "gather" in name else args[:1]) if isinstance(a, torch.Tensor)), None
            )
            given.append(0 if sent is None else sent.numel() * sent.element_size())
            inside = True
            try:
                return call(*args, **kwargs)
            finally:
                inside = False

        return observe

    send = dist.ProcessGroup.send

    def observe_sent(group: dist.ProcessGroup, tensors: list[torch.Tensor], target: int, tag: int) -> Any:
        # Messages that a rank sends to all others at once are one exchange; that to the next rank stands for it.
        if not inside and target == (group.rank() + 1) % group.size():
            given.append(sum(tensor.nbytes for tensor in tensors))
        return send(group, tensors, target, tag)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(dist.ProcessGroup, "send", observe_sent))
        for name in _COLLECTIVES:
            for module in (dist, dist.distributed_c10d):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, observing(getattr(module, name), name)))
        yield given


def batches(rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(rank)
    rows = [ROWS - at % (rank + 2) for at in range(BATCHES)]
    return [
        (torch.rand(n, CLASSES, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in rows
    ]


def classification(count: int, **options: Any) -> dict[str, Metric]:
    kinds: list[Callable[..., Metric]] = [
        lambda **o: MulticlassAccuracy(CLASSES, average="micro", **o),
        lambda **o: MulticlassPrecision(CLASSES, **o),
        lambda **o: MulticlassRecall(CLASSES, **o),
        lambda **o: MulticlassConfusionMatrix(CLASSES, **o),
    ]
    return {f"metric {at}": kinds[at % len(kinds)](validate_args=False, **options) for at in range(count)}


def by_allstep(world: World, count: int) -> Callable[[], object]:
    engine = Engine(lambda engine, batch: batch, uneven="longest", idle="skip")
    metrics = classification(count)
    Metrics(metrics).attach(engine)
    engine.run(batches(world.rank))
    reduction: Any = engine.extension.reductions[0]
    batch = batches(world.rank)[0]

    def prepare() -> None:
        for metric in metrics.values():
            metric.update(*batch)

    return Prepared(prepare, lambda: reduction(engine))


def by_torchmetrics(world: World, count: int) -> Callable[[], object]:
    metrics = classification(count, compute_with_cache=False)
    for batch in batches(world.rank):
        for metric in metrics.values():
            metric.update(*batch)

    def prepare() -> None:
        for metric in metrics.values():
            metric.update(*batch)

    return Prepared(prepare, lambda: [metric.compute() for metric in metrics.values()])


def by_ignite(world: World, count: int) -> Callable[[], object]:
    from ignite import metrics as ignite

    kinds: list[Callable[[], Any]] = [
        ignite.Accuracy,
        lambda: ignite.Precision(average="macro"),
        lambda: ignite.Recall(average="macro"),
        lambda: ignite.ConfusionMatrix(CLASSES),
    ]
    metrics = [kinds[at % len(kinds)]() for at in range(count)]

    def prepare() -> None:
        for metric in metrics:  # a result is kept, and the states of some are overwritten by it
            metric.reset()
            metric.update(batch)

    batch = batches(world.rank)[0]
    return Prepared(prepare, lambda: [metric.compute() for metric in metrics])


class Prepared:
    """An epoch's end behind an update with the epoch's last batch, as it comes in a loop; only the end is timed."""

    def __init__(self, prepare: Callable[[], object], end: Callable[[], object]) -> None:
        self._prepare = prepare
        self._end = end
        self.began = 0.0

    def __call__(self) -> object:
        self._prepare()
        dist.barrier()
        self.began = time.perf_counter()
        return self._end()


def by_lightning(world: World, count: int) -> Callable[[], object]:
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")] * world.world_size)
    values = [batch[0].mean() for batch in batches(world.rank)]
    results = _ResultCollection(training=False)

    def prepare() -> None:
        nonlocal results
        results = _ResultCollection(training=False)
        for value in values[:2]:
            for at in range(count):
                results.log(
                    "validation_step",
                    f"metric {at}",
                    value,
                    on_step=False,
                    on_epoch=True,
                    sync_dist=True,
                    sync_dist_fn=strategy.reduce,
                    batch_size=ROWS,
                )

    return Prepared(prepare, lambda: results.metrics(on_step=False))


def by_accelerate(world: World, count: int) -> Callable[[], object]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    data = batches(0)  # it gathers batches of one size

    def epoch() -> object:
        metrics = classification(count, sync_on_compute=False)
        gathered = [accelerator.gather_for_metrics(batch) for batch in data]
        for batch in gathered:
            for metric in metrics.values():
                metric.update(*batch)
        return [metric.compute() for metric in metrics.values()]

    return epoch


CONTENDERS: dict[str, Callable[[World, int], Callable[[], object]]] = {
    "allstep": by_allstep,
    "torchmetrics": by_torchmetrics,
    "PyTorch-Ignite": by_ignite,
    "Lightning, self.log": by_lightning,
    "Accelerate, gather_for_metrics, whole epoch": by_accelerate,
}


def timed(run: Callable[[], object]) -> float:
    """Seconds on the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    run()
    end = time.perf_counter()
    took = torch.tensor(end - (run.began if isinstance(run, Prepared) else begin), dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def measure(world: World, count: int, repetitions: int) -> dict[str, tuple[Traffic, float]]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    runs: dict[str, Callable[[], object]] = {}
    for name, make in CONTENDERS.items():
        try:
            runs[name] = make(world, count)
        except ImportError as error:
            if world.is_main:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    traffic = {}
    for name, run in runs.items():
        run()
        prepared = isinstance(run, Prepared)
        with observed() as given:
            run()
        traffic[name] = Traffic(len(given) - prepared, sum(given))
    times: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0).shuffle  # the same on all ranks
    order = list(runs)
    for _ in range(repetitions):
        shuffle(order)
        for name in order:
            times[name].append(timed(runs[name]))
    return {name: (traffic[name], statistics.median(times[name])) for name in runs}


def taking(metrics: Metrics, batch: Batch, output: object) -> Callable[[], object]:
    """The event at which metrics take an iteration's output."""
    engine = Engine(lambda engine, batch: batch, coordinator=Alone())
    metrics.attach(engine)
    state = engine.state
    state.output, state.batch = output, batch

    def take() -> None:
        state.iteration += 1  # each iteration is taken once
        engine.fire_event(Events.ITERATION_COMPLETED)

    return take


@dataclass(frozen=True)
class Cost:
    """Microseconds of an update: the median, the least, and the median ratio to the other of its turn."""

    median: float
    least: float
    ratio: float


def update_costs(repetitions: int) -> dict[str, Cost]:
    """What an update costs on one rank: for each pair, one that torchmetrics does, then ours of the same values."""
    torch.set_num_threads(1)
    batch, value = batches(0)[0], torch.tensor(0.5)
    pairs: list[tuple[int, dict[str, Callable[[], object]]]] = []
    for count in COUNTS:
        calls = {
            f"{metrics_of(count)}, a loop over torchmetrics": looping(classification(count), batch),
            f"{metrics_of(count)}, allstep": taking(Metrics(classification(count)), batch, batch),
        }
        pairs.append((max(1, CALLS // count), calls))
    theirs, ours, within = MeanMetric(), Mean(), taking(Metrics({"mean": Mean()}), batch, value)
    of_means = {"Mean, allstep": lambda: ours.update(value, ROWS), "Mean, allstep, through Metrics": within}
    for name, call in of_means.items():
        pairs.append((CALLS, {"MeanMetric, torchmetrics": lambda: theirs.update(value, ROWS), name: call}))
    found: dict[str, Cost] = {}
    for calls_in_turn, pair in pairs:
        found |= in_turns(pair, calls_in_turn, repetitions)
    return found


def metrics_of(count: int) -> str:
    return f"{count} metric{'s' if count > 1 else ''}"


def looping(metrics: dict[str, Metric], batch: Batch) -> Callable[[], object]:
    return lambda: [metric.update(*batch) for metric in metrics.values()]


def in_turns(pair: dict[str, Callable[[], object]], calls: int, repetitions: int) -> dict[str, Cost]:
    """Time two in turns, each first in every second one, since who follows whom matters to caches."""
    times: dict[str, list[float]] = {name: [] for name in pair}
    for at in range(repetitions):
        for name in list(pair) if at % 2 else reversed(pair):
            begin = time.perf_counter()
            for _ in range(calls):
                pair[name]()
            times[name].append((time.perf_counter() - begin) / calls * 1e6)
    first = next(iter(times.values()))
    return {
        name: Cost(statistics.median(taken), min(taken), statistics.median(map(truediv, taken, first)))
        for name, taken in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--quick", action="store_true", help="two repetitions over two ranks, to try it")
    options = parser.parse_args()
    repetitions, worlds = (2, [2]) if options.quick else (options.repetitions, options.ranks)
    print(f"{machine_line()}; load average {os.getloadavg()[0]:.1f}")
    print(f"{repetitions} repetitions; {CLASSES} classes, {BATCHES} batches of up to {ROWS} rows a rank.\n")
    for world_size in worlds:
        print(f"{world_size} gloo ranks\n\n| metrics | | collectives, messages | bytes a rank gives | ms | / allstep |")
        print("|---:|---|---:|---:|---:|---:|")
        for count in COUNTS:
            found = run_ranks(measure, world_size, count, repetitions, timeout=1800)[0]
            own = found["allstep"][1]
            for name, (traffic, seconds) in found.items():
                ratio = f"{seconds / own:.1f}"
                cells = (count, name, traffic.collectives, f"{traffic.bytes:,}", f"{seconds * 1e3:.2f}", ratio)
                print("| " + " | ".join(map(str, cells)) + " |")
            if count == 10:
                gain = found["torchmetrics"][1] / own
                verdict = "reached" if gain >= AIM else "missed"
                note = f"aim: {AIM:.0f} times faster than torchmetrics at ten metrics, {verdict}: {gain:.1f}"
        print(f"\n({note})\n")
    print("| an update on one rank | µs, median | µs, least | / torchmetrics |\n|---|---:|---:|---:|")
    costs = update_costs(repetitions * 20)
    for name, cost in costs.items():
        print(f"| {name} | {cost.median:.1f} | {cost.least:.1f} | {cost.ratio:.2f} |")
    ratios = [costs[f"{metrics_of(count)}, allstep"].ratio for count in COUNTS]
    verdict = "reached" if max(ratios) <= MOST_OF_AN_UPDATE else "missed"
    print(f"\n(aim: updates cost torchmetrics' own, at most {MOST_OF_AN_UPDATE} times, {verdict}: {max(ratios):.2f})")


if __name__ == "__main__":
    main()
