"""How long a test waits for its ranks: processes forked from the warm server, against starting interpreters.

Two ways to have N ranks open a World, reduce one number and close it, interleaved, so that a busy machine is busy for
both of them:
- forked: `run_ranks`, whose server has imported torch by the first call;
- started: new interpreters, as a test does that starts its ranks with multiprocessing's "spawn".

    python benchmarks/ranks_start.py [--worlds 2 4] [--trials 10] [--ways forked started]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from allstep.launch.environment import ReservedPort, worker_environment
from allstep.testing import run_ranks

from machine import machine_line


def reduce_once(world: object) -> float:
    return float(world.all_reduce(1.0))  # type: ignore[attr-defined]


def rank_main(place: dict[str, str]) -> None:
    os.environ.update(place)
    import allstep

    with allstep.init() as world:
        reduce_once(world)


def start_all(world_size: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ReservedPort(shared=True) as reserved:
        run_id = uuid.uuid4().hex[:8]
        processes = [
            context.Process(
                target=rank_main,
                args=(
                    worker_environment(
                        rank=rank,
                        world_size=world_size,
                        local_rank=rank,
                        local_world_size=world_size,
                        master_addr="127.0.0.1",
                        master_port=reserved.port,
                        run_id=run_id,
                    ),
                ),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert all(process.exitcode == 0 for process in processes)


WAYS: dict[str, Callable[[int], object]] = {
    "forked": lambda world_size: run_ranks(reduce_once, world_size),
    "started": start_all,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(machine_line())
    print(f"\nseconds for a call, median (least to most) of {arguments.trials}\n")
    print(f"| ranks | {' | '.join(arguments.ways)} |\n|---|{'---|' * len(arguments.ways)}")
    for world_size in arguments.worlds:
        taken: dict[str, list[float]] = {name: [] for name in arguments.ways}
        for trial in range(arguments.trials + 1):
            for name in taken:
                began = time.perf_counter()
                WAYS[name](world_size)
                if trial:  # the first starts the server
                    taken[name].append(time.perf_counter() - began)
        cells = [f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})" for times in taken.values()]
        print(f"| {world_size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
