"""A training script: every step reduces over the ranks.

Its argument: seconds that rank 1's clean-up takes, after it has destroyed the process group. By default there is none.
"""

import os
import sys
import time

import torch.distributed as dist

import allstep
from allstep import Engine, Events


def main(world: allstep.World) -> None:
    def train_step(engine, batch):
        world.all_reduce(1.0)

    trainer = Engine(train_step)

    @trainer.on(Events.STARTED)
    def say() -> None:
        sys.stdout.write(f"training: rank {world.rank}, pid {os.getpid()}\n")  # in one piece: the stream may be shared

    try:
        trainer.run(range(100), max_epochs=10)
    finally:
        sys.stdout.write(f"the run was left at {time.monotonic()} by rank {world.rank}\n")
        if len(sys.argv) > 1 and world.rank == 1:
            dist.destroy_process_group()
            time.sleep(float(sys.argv[1]))  # the clean-up


if __name__ == "__main__":
    with allstep.init() as world:
        main(world)
