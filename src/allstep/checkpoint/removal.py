"""Removing checkpoints and what dead attempts left.

Contract: the manifest goes first, so that a checkpoint whose removal was cut short is one that was never finished, and
is swept away at the next start. A folder of checkpoints belongs to one run at a time: `sweep` takes every save that is
not committed for dead.
"""

from __future__ import annotations

from allstep.checkpoint.layout import MANIFEST, is_temporary, read_name
from allstep.checkpoint.storage import Storage


def remove_checkpoint(storage: Storage, folder: str) -> None:
    """Remove a checkpoint, committed or not."""
    storage.remove_file(folder, MANIFEST)
    storage.remove(folder)


def sweep(storage: Storage) -> list[str]:
    """Remove the folders of saves that were never committed, and return their names."""
    dead = [folder for folder in storage.folders() if is_dead(storage, folder)]
    for folder in dead:
        storage.remove(folder)
    return dead


def is_dead(storage: Storage, folder: str) -> bool:
    """Whether a folder is a save's that was never committed."""
    if is_temporary(folder):
        return True
    return read_name(folder) is not None and MANIFEST not in storage.files(folder)
