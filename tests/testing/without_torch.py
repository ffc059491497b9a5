"""Functions for ranks in a module that loads no torch, for those who start an interpreter and are to be quick."""

import signal
from typing import Any


def rank_of(world: Any) -> int:
    return int(world.rank)


def stays_in_a_collective(world: Any) -> None:
    world.barrier()  # both are here
    if world.rank == 1:
        print("in a collective", flush=True)
        signal.pause()
    world.barrier()
