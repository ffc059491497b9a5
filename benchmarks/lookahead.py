"""How much host memory reading ahead takes, where batches have to be read to be counted.

Two gloo ranks iterate over batches of 40 MiB that a generator makes, doing nothing with them. For each `lookahead` a
new pair of processes counts the batches that are alive at the same time, and how far the peak resident size of a rank
grows over that of an engine alone, in which two are alive: the step's, and the next while it is made. With agreement
the step has one in its hands, one is kept as a filler, and the others are read ahead.

    python benchmarks/lookahead.py [--lookaheads 1 2 4 8 16]
"""

from __future__ import annotations

import argparse
import resource
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from allstep import Alone, Engine, World
from allstep.testing import run_ranks

from machine import machine_line

MEBIBYTES, BATCHES = 40, 50  # above 32 MiB the C library gives memory back at once


class Batches:
    """A series without a length that knows how many of its batches are alive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.alive = self.most = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.count):
            batch = torch.ones(MEBIBYTES, 2**20, dtype=torch.uint8)
            weakref.finalize(batch, self._gone)
            self.alive += 1
            self.most = max(self.most, self.alive)
            yield batch
            del batch

    def _gone(self) -> None:
        self.alive -= 1


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def measure(world: World, lookahead: int | None) -> tuple[int, float]:
    batches = Batches(BATCHES)
    coordinator = Alone() if lookahead is None else None
    engine = Engine(lambda engine, batch: None, name="reader", coordinator=coordinator)
    Engine(lambda engine, batch: None, coordinator=Alone()).run(Batches(3))
    before = peak_mebibytes()
    engine.run(batches, lookahead=lookahead)
    return batches.most, peak_mebibytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lookaheads", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    print(machine_line())
    print(f"\nBatches of {MEBIBYTES} MiB, {BATCHES} of them, 2 gloo ranks; the greater of both.\n")
    print("| lookahead | batches alive at most | growth of the peak resident size, MiB |\n|---:|---:|---:|")
    for lookahead in [None, *options.lookaheads]:
        found = run_ranks(measure, 2, lookahead)
        name = "no agreement" if lookahead is None else str(lookahead)
        print(f"| {name} | {max(n for n, _ in found)} | {max(grew for _, grew in found):.0f} |", flush=True)


if __name__ == "__main__":
    main()
