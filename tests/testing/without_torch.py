"""Functions for ranks in a module that loads no torch, for those who start an interpreter and are to be quick."""

import os
import signal
from pathlib import Path
from typing import Any


def rank_of(world: Any) -> int:
    return int(world.rank)


def tell(world: Any, folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()


def tell_and_stay(world: Any, folder: str) -> None:
    if world.rank == 1:
        (Path(folder) / "in a collective").touch()
        signal.pause()
    world.barrier()
