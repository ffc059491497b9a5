"""A training script: every step reduces over the ranks. Arguments: seconds that a clean-up takes (default: none)."""

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
        sys.stdout.write("training\n")  # in one piece: ranks may share the stream

    try:
        trainer.run(range(100), max_epochs=10)
    finally:
        if len(sys.argv) > 1 and world.rank == 1:
            dist.destroy_process_group()
            print("cleaning up", flush=True)
            time.sleep(float(sys.argv[1]))


if __name__ == "__main__":
    with allstep.init() as world:
        main(world)
