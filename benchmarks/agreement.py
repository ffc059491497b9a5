"""What it costs that ranks agree: ways to train on data of uneven or unknown length, against a plain DDP loop.

Two gloo ranks on this machine train a small MLP. An iteration takes about 10 ms: forward, backward with DDP's reduction
and the optimizer take a few of them on the CPU, and a sleep of fixed length, calibrated once, stands for a device at
work. All contenders share the two processes, the model and the data, which is even, so that all do the same work:

- allstep, lengths known: a DataLoader over a map-style dataset, in windows of up to 32 iterations;
- allstep, lengths unknown: an iterable dataset, read ahead by up to 32 small batches, in windows of up to 16;
- DDP in torch's Join;
- a plain loop with one synchronous all-reduce of a number in each iteration;
- Accelerate's dispatching loader (rank 0 reads and sends to all), its default for iterable datasets;
- PyTorch-Ignite's Engine, which agrees on nothing.

Each is compared with the plain loop over the same kind of data in blocks of plain, other, other, plain (ABBA), which
cancel a drift of the machine. The first iterations of a run are not timed: one, and for allstep the 31 in which windows
grow to their length. The table has the median of the blocks' ratios and its 95 % interval by bootstrap over blocks.

Measured apart, with an empty step: what a run's start and end take (ranks compare what they are about to do, and vote
at the epoch's end and the run's), and the CPU time of agreement, that of two ranks' iterations less that of an engine
alone. Most of it is spent in gloo's own threads, beside the step.

    pip install allstep[bench]; python benchmarks/agreement.py [--blocks 20] [--iterations 50]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.utils.data import DataLoader, Dataset, IterableDataset

sys.path.insert(0, str(Path(__file__).resolve().parent))

from allstep import Alone, Engine, World
from allstep.testing import run_ranks

from machine import machine_line

AIM = 1.02
STEP_SECONDS = 0.010
BATCH, FEATURES, WIDTH, CLASSES = 128, 64, 256, 10

GROWING = 31  # 1 + 2 + 4 + 8 + 16: windows before the first of 32

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """`run` goes through `untimed` iterations and then those that are timed; `base` is what it is compared with."""

    run: Callable[[], object]
    untimed: int = 1
    base: str = "plain loop"


class Rows(Dataset[Batch]):
    """`batches` batches of the same random rows, fetched a whole batch at a time."""

    def __init__(self, batches: int) -> None:
        self.length = batches * BATCH
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(BATCH, FEATURES, generator=generator)
        self.y = torch.randint(CLASSES, (BATCH,), generator=generator)

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = torch.tensor(indices) % BATCH
        return self.x[rows], self.y[rows]


class Stream(IterableDataset[Batch]):
    """The same batches from a source that does not tell how many there are."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.rows), BATCH):
            yield self.rows.__getitems__(list(range(first, first + BATCH)))


def as_it_is(batch: Batch) -> Batch:
    return batch


class Step:
    """Trains on a batch, sleeps, and notes when it was done."""

    def __init__(self, model: nn.Module, sleep: float) -> None:
        self.model = model
        self.sleep = sleep
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.done: list[float] = []

    def __call__(self, engine: Any, batch: Batch) -> None:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        time.sleep(self.sleep)
        self.done.append(time.perf_counter())


def contenders(step: Step, iterations: int) -> dict[str, Contender]:
    rows, more_rows = Rows(1 + iterations), Rows(GROWING + iterations)
    known, unknown = whole_batches(rows), DataLoader(Stream(rows), batch_size=None)
    long_known, long_unknown = whole_batches(more_rows), DataLoader(Stream(more_rows), batch_size=None)
    group = dist.new_group(backend="gloo")

    def plain(loader: Any) -> None:
        for batch in loader:
            step(None, batch)

    def join() -> None:
        with Join([step.model]):  # type: ignore[list-item]
            plain(known)

    def synchronous() -> None:
        for batch in known:
            dist.all_reduce(torch.ones(1, dtype=torch.int64), group=group)
            step(None, batch)

    def allstep(loader: Any) -> None:
        Engine(step, name="step").run(loader)

    found = {
        "plain loop": Contender(lambda: plain(known), base=""),
        "plain loop, unknown": Contender(lambda: plain(unknown), base=""),
        "allstep, lengths known": Contender(lambda: allstep(long_known), GROWING),
        "allstep, lengths unknown": Contender(lambda: allstep(long_unknown), GROWING, "plain loop, unknown"),
        "DDP in Join": Contender(join),
        "synchronous all-reduce": Contender(synchronous),
    }
    with contextlib.suppress(ImportError):
        loader = dispatching(rows)
        found["Accelerate, dispatching loader"] = Contender(lambda: plain(loader), base="plain loop, unknown")
    with contextlib.suppress(ImportError):
        from ignite.engine import Engine as IgniteEngine

        found["PyTorch-Ignite"] = Contender(lambda: IgniteEngine(step).run(known))
    return found


def whole_batches(rows: Rows) -> DataLoader[Batch]:
    return DataLoader(rows, batch_size=BATCH, collate_fn=as_it_is)


def dispatching(rows: Rows) -> Any:
    """Accelerate's loader that reads on rank 0 for all: two batches at a time here, one for each rank."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    both = Rows(2 * len(rows) // BATCH)
    return accelerator.prepare_data_loader(DataLoader(Stream(both), batch_size=None))


def calibrate(world: World, model: nn.Module) -> tuple[float, float]:
    """Seconds that the step computes, and how long it has to sleep."""
    compute = Step(model, 0.0)
    batch = Rows(1).__getitems__(list(range(BATCH)))
    for _ in range(200):
        compute(None, batch)
    took = [after - before for before, after in pairwise(compute.done)]
    quick = statistics.quantiles(took, n=10)[0]  # the machine's own pace, whatever else runs on it just now
    computes = world.all_reduce(quick, op="mean")
    return computes, max(0.0, STEP_SECONDS - computes)


def timed(contender: Contender, step: Step) -> float:
    """Seconds per iteration of a run."""
    step.done.clear()
    dist.barrier()
    contender.run()
    done = step.done[contender.untimed - 1 :]
    return (done[-1] - done[0]) / (len(done) - 1)


def start_and_end() -> float:
    """Seconds that the run of a single empty iteration takes more than alone."""

    def run(**coordinator: Any) -> float:
        dist.barrier()
        begin = time.perf_counter()
        Engine(lambda engine, batch: None, name="empty", **coordinator).run([torch.ones(1)])
        return time.perf_counter() - begin

    return statistics.median(run() - run(coordinator=Alone()) for _ in range(100))


def agreement_cpu(data: Callable[[int], Any], iterations: int, lookahead: int | None = None) -> tuple[float, float]:
    """CPU µs per iteration, of the whole process and of its main thread, that agreement adds to an empty step's run."""

    def cpu(**coordinator: Any) -> tuple[float, float]:
        engine = Engine(lambda engine, batch: None, name="empty", **coordinator)
        dist.barrier()
        process, thread = time.process_time(), time.thread_time()
        engine.run(data(iterations), epoch_length=iterations, lookahead=lookahead)
        return time.process_time() - process, time.thread_time() - thread

    cpu()
    rounds = [(cpu(), cpu(coordinator=Alone())) for _ in range(5)]
    process, thread = (
        statistics.median(agreed[clock] - alone[clock] for agreed, alone in rounds) / iterations * 1e6
        for clock in (0, 1)
    )
    return process, thread


def batches_of_ones(iterations: int) -> Iterator[torch.Tensor]:
    return repeat(torch.ones(BATCH), iterations)


def measure(world: World, blocks: int, iterations: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = world.wrap(
        nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
        )
    )
    computes, sleeps = calibrate(world, model)
    step = Step(model, sleeps)
    runs = contenders(step, iterations)
    for contender in runs.values():
        contender.run()
    ratios: dict[str, list[float]] = {name: [] for name, contender in runs.items() if contender.base}
    plain: list[float] = []
    for _ in range(blocks):
        for name, found in ratios.items():
            run, base = runs[name], runs[runs[name].base]
            a, b, c, d = (timed(each, step) for each in (base, run, run, base))
            found.append((b + c) / (a + d))
            plain += [a, d]
    cpu = {
        "lengths known, windows of 32": agreement_cpu(lambda iterations: None, 6400),
        "lengths unknown, windows of up to 16": agreement_cpu(batches_of_ones, 6400),
        "lengths unknown, lookahead=4, windows of 2": agreement_cpu(batches_of_ones, 3200, 4),
    }
    return {
        "computes": computes,
        "sleeps": sleeps,
        "iteration": statistics.median(plain),
        "start and end": start_and_end(),
        "ratios": ratios,
        "cpu": cpu,
    }


def interval(ratios: list[float], draws: int = 5000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(1)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def verdict(low: float, high: float) -> str:
    if high <= AIM:
        return "within"
    return "above" if low > AIM else "inconclusive"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=50)
    options = parser.parse_args()
    found = run_ranks(measure, 2, options.blocks, options.iterations, timeout=1800)[0]
    print(machine_line())
    print(
        f"\n2 gloo ranks, MLP {FEATURES}-{WIDTH}-{WIDTH}-{CLASSES}, {BATCH} rows a rank. An iteration of the plain "
        f"loop takes {found['iteration'] * 1e3:.2f} ms: about {found['computes'] * 1e3:.1f} ms of computing and "
        f"reducing, and a sleep of {found['sleeps'] * 1e3:.1f} ms.\n"
        f"{options.blocks} ABBA blocks, {options.iterations} timed iterations a run.\n"
    )
    print(f"| | time / plain loop | 95 % interval | at most {AIM}? |\n|---|---:|---:|---|")
    for name, ratios in found["ratios"].items():
        low, high = interval(ratios)
        print(f"| {name} | {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} | {verdict(low, high)} |")
    print(f"\nA run's start and end take {found['start and end'] * 1e3:.1f} ms more than those of an engine alone.")
    print("\n| CPU time of agreement, µs per iteration | process | of it the main thread |\n|---|---:|---:|")
    for name, (process, thread) in found["cpu"].items():
        print(f"| {name} | {process:.1f} | {thread:.1f} |")


if __name__ == "__main__":
    main()
