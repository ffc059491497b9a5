"""Time from a resumed run's start to its first new iteration, from different places in an epoch, in each library.

    python benchmarks/resume.py
    python benchmarks/resume.py --only allstep --iterations 1000 100000 10000000

A shuffled map-style dataset of rows that cost nothing to load, in batches of 32, without workers. What is timed begins
with objects that are made and a state that is loaded, and ends when the step is called with the first batch that was
not trained before: the cost of finding the place. Accelerate skips with `skip_first_batches`; PyTorch-Ignite loads the
engine's state and reads the epoch's batches up to the place. The libraries take turns. A peer that is not installed is
left out (`pip install -e .[bench]`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset

from machine import machine_line

BATCH = 32


class Rows(Dataset[torch.Tensor]):
    """As many rows as asked for, made when they are read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.row = torch.zeros(8)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.row


class FirstStep(Exception):
    """Raised by the step: the time is up."""


def until_first_step(run: Callable[[], object]) -> float:
    """Seconds until `run` raises FirstStep."""
    began = time.perf_counter()
    try:
        run()
    except FirstStep:
        return time.perf_counter() - began
    raise AssertionError("the step was not called")


def by_allstep(iteration: int) -> float:
    import allstep

    def step(engine: allstep.Engine, batch: torch.Tensor) -> None:
        raise FirstStep

    rows = Rows(BATCH * (iteration + 10))
    with allstep.init() as world:
        before = world.loader(rows, batch_size=BATCH, shuffle=True, sample_seeding="off")
        state = {"iteration": iteration, "epoch_length": len(before), "max_epochs": 1}
        state["data"] = {"position": before.state_dict(iteration, 0), "batches": len(before), "group_size": 1}
        loader = world.loader(rows, batch_size=BATCH, shuffle=True, sample_seeding="off")
        engine = allstep.Engine(step)
        engine.logger.disabled = True
        engine.load_state_dict(state)
        return until_first_step(lambda: engine.run(loader, max_epochs=1))


def by_accelerate(iteration: int) -> float:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Rows(BATCH * (iteration + 10)), batch_size=BATCH, shuffle=True))
    began = time.perf_counter()
    for _ in accelerator.skip_first_batches(loader, iteration):
        return time.perf_counter() - began
    raise AssertionError("there was no batch")


def by_ignite(iteration: int) -> float:
    from ignite.engine import Engine

    def step(engine: Engine, batch: torch.Tensor) -> None:
        raise FirstStep

    loader = DataLoader(Rows(BATCH * (iteration + 10)), batch_size=BATCH, shuffle=True)
    engine = Engine(step)
    engine.logger.disabled = True
    engine.load_state_dict({"iteration": iteration, "max_epochs": 1, "epoch_length": len(loader)})
    return until_first_step(lambda: engine.run(loader, max_epochs=1))


LIBRARIES: dict[str, Callable[[int], float]] = {
    "allstep": by_allstep,
    "Accelerate skip_first_batches": by_accelerate,
    "PyTorch-Ignite": by_ignite,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, nargs="+", default=[10, 1_000, 100_000])
    parser.add_argument("--only", choices=list(LIBRARIES), nargs="+", default=list(LIBRARIES))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, dict[int, list[float]]] = {}
    for name in options.only:
        try:
            LIBRARIES[name](1)  # what it does the first time is not measured
            seconds[name] = {each: [] for each in options.iterations}
        except ImportError as error:
            if name == "allstep":
                raise
            print(f"{name} is left out: {error}")
    for _ in range(options.repeats):
        for each in options.iterations:
            for name, times in seconds.items():
                times[each].append(LIBRARIES[name](each))
    print(f"{machine_line()}\n\nmilliseconds to the first new iteration, median of {options.repeats}, from iteration\n")
    print("| library | " + " | ".join(f"{each:,}" for each in options.iterations) + " |")
    print("| :--- |" + " ---: |" * len(options.iterations))
    for name, times in seconds.items():
        cells = (f"{statistics.median(each) * 1e3:,.2f}" for each in times.values())
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
