"""What it costs to know the next sample: ShardedBatchSampler against torch's DistributedSampler, shuffling.

Both are read as a DataLoader reads them, in batches of 64 (DistributedSampler through torch's BatchSampler), by rank 0
of 2. Each case runs in a process of its own, so that its peak memory is its own:

- first batch: from making the sampler to its first batch in hand;
- memory: how much the process' peak resident size grew by the end;
- ns per index: over the next million indices, or the epoch's rest.

    python benchmarks/sampler.py [--lengths 1000000 10000000 100000000]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import machine_line

BATCH, WORLD_SIZE, INDICES = 64, 2, 1_000_000
CONTENDERS = ("DistributedSampler", "ShardedBatchSampler")


class Sized:
    """Stands for a dataset: a length and nothing else."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def sampler(contender: str, length: int) -> object:
    if contender == "DistributedSampler":
        from torch.utils.data import BatchSampler, DistributedSampler

        ours = DistributedSampler(Sized(length), num_replicas=WORLD_SIZE, rank=0, shuffle=True, seed=1)
        return BatchSampler(ours, BATCH, drop_last=False)
    from allstep.data import ShardedBatchSampler

    return ShardedBatchSampler(length, batch_size=BATCH, rank=0, world_size=WORLD_SIZE, shuffle=True, seed=1)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def measure(contender: str, length: int) -> dict[str, float]:
    next(iter(sampler(contender, 64 * WORLD_SIZE)))  # imports, and whatever the first use costs
    before = peak_megabytes()
    begin = time.perf_counter()
    batches = iter(sampler(contender, length))
    next(batches)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    indices = sum(len(batch) for batch in islice(batches, INDICES // BATCH))
    each = (time.perf_counter() - begin) / indices
    return {"first_ms": first * 1e3, "megabytes": peak_megabytes() - before, "ns": each * 1e9}


def measure_apart(contender: str, length: int) -> dict[str, float]:
    """The fastest of a few processes; a slow start is measured once."""
    command = [sys.executable, __file__, "--case", contender, "--lengths", str(length)]
    best: dict[str, float] = {}
    for _ in range(5):
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        one: dict[str, float] = json.loads(out)
        best = {key: min(value, best.get(key, value)) for key, value in one.items()}
        if one["first_ms"] > 5000:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--case", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.lengths[0])))
        return
    print(machine_line(), end="\n\n")
    print("| samples | sampler | first batch, ms | memory, MB | ns per index |")
    print("| ---: | :--- | ---: | ---: | ---: |")
    for length in arguments.lengths:
        for contender in CONTENDERS:
            found = measure_apart(contender, length)
            print(
                f"| {length:,} | {contender} | {found['first_ms']:,.2f} | {found['megabytes']:,.1f} "
                f"| {found['ns']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
