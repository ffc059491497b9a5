"""What a window of agreement costs a rank, by the number of ranks, up to a simulated world of 4,096.

Every rank of the world is run in this process, one after the other, with the logic that real ranks run: the samples of
each coming global batch (`ShardedBatchSampler.counts`, for all ranks, of which a rank picks its own), the rank's vote
and its vector, and, from the sum of all ranks' vectors, the result and the ledger. What is not here is the reduction
itself, which a network does; its size is in the table. Each rank's ledger is compared with the others' and with the
global batches, the last of which has fewer samples than the world has ranks.

    python benchmarks/ledger_scale.py [--worlds 2 64 512 4096] [--window 32]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from allstep.coordination import Ledger, Occasion, Vote, agree_window, read_result, vector_length
from allstep.data import ShardedBatchSampler

from machine import machine_line

BATCH = 8  # samples a rank takes in a batch
LEAST_TAIL = 1
LEAST_RANKS = 512  # small worlds are run again until so many ranks were measured


@dataclass
class Costs:
    counts: list[float] = field(default_factory=list)
    vector: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)


def sampler_of(rank: int, world_size: int, window: int) -> ShardedBatchSampler:
    """Two windows of batches, less one, and a tail of one sample for the whole world."""
    length = (2 * window - 1) * BATCH * world_size + LEAST_TAIL
    return ShardedBatchSampler(length, batch_size=BATCH, rank=rank, world_size=world_size, shuffle=True, seed=1)


def own_samples(sampler: ShardedBatchSampler, start: int, window: int) -> list[int | None]:
    """What this rank's vote says: None where it has no batch."""
    return [int(n) or None for n in sampler.counts(start, start + window)[:, sampler.rank]]


def vote_vector(samples: list[int | None], sequence: int, window: int) -> list[int]:
    return Vote(occasion=Occasion.WINDOW, sequence=sequence, samples=samples).vector(vector_length(window))


def read(total: list[int], window: int, world_size: int) -> Ledger:
    return agree_window(read_result(total, window), "longest", world_size, 1, group_goes_on=False)


def run_window(world_size: int, window: int, sequence: int, costs: Costs) -> None:
    total = [0] * vector_length(window)
    start = sequence * window
    for rank in range(world_size):
        sampler = sampler_of(rank, world_size, window)
        began = time.perf_counter()
        samples = own_samples(sampler, start, window)
        counted = time.perf_counter()
        vector = vote_vector(samples, sequence, window)
        costs.vector.append(time.perf_counter() - counted)
        costs.counts.append(counted - began)
        total = [a + b for a, b in zip(total, vector, strict=True)]
    ledgers = set()
    for _ in range(world_size):
        began = time.perf_counter()
        ledgers.add(read(total, window, world_size))
        costs.reading.append(time.perf_counter() - began)
    (ledger,) = ledgers
    whole = [BATCH * world_size] * window
    assert list(ledger.group_totals) == (whole if sequence == 0 else [*whole[1:], LEAST_TAIL]), ledger


def peak_of_one_rank(world_size: int, window: int) -> int:
    """Bytes that one rank's window takes at its peak, besides the sampler that it has anyway."""
    sampler = sampler_of(world_size - 1, world_size, window)
    own_samples(sampler, 0, window)
    tracemalloc.start()
    vector = vote_vector(own_samples(sampler, 0, window), 0, window)
    read([n * world_size for n in vector], window, world_size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 64, 512, 4096])
    parser.add_argument("--window", type=int, default=32)
    options = parser.parse_args()
    window = options.window
    print(machine_line())
    print(
        f"\nOne window of {window} iterations; medians over all ranks and two windows, one with the epoch's tail. "
        f"A rank's vector has {vector_length(window)} integers, {8 * vector_length(window)} bytes.\n"
    )
    print("| ranks | counts, µs | vote and vector, µs | sum and ledger, µs | µs per iteration | peak memory, KiB |")
    print("|---:|---:|---:|---:|---:|---:|")
    for world_size in options.worlds:
        run_window(2, window, 0, Costs())  # whatever the first use costs
        costs = Costs()
        for _ in range(max(1, LEAST_RANKS // world_size)):
            for sequence in range(2):
                run_window(world_size, window, sequence, costs)
        parts = [statistics.median(part) * 1e6 for part in (costs.counts, costs.vector, costs.reading)]
        print(
            f"| {world_size:,} | "
            + " | ".join(f"{part:.0f}" for part in parts)
            + f" | {sum(parts) / window:.1f} | {peak_of_one_rank(world_size, window) / 1024:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
