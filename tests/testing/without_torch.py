"""Functions for ranks in a module that loads no torch, for those who start an interpreter and are to be quick."""

import os
import signal
from pathlib import Path
from typing import Any


def rank_of(world: Any) -> int:
    return int(world.rank)


def tell(world: Any, folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    (Path(folder) / str(os.getppid())).touch()


def tell_and_stay(world: Any, folder: str) -> None:
    tell(world, folder)
    world.barrier()  # both have told their pids
    if world.rank == 1:
        (Path(folder) / "in a collective").touch()
        signal.pause()
    world.barrier()
