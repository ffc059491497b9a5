"""Removing checkpoints and what dead attempts left.

Contract: a checkpoint whose removal was cut short is none any more, and is swept away at the next start: it is renamed
to an unfinished save first or, where there is no rename, loses its manifest first. A folder of checkpoints belongs to
one run at a time: `sweep` takes every save that is not committed for dead. Where there is rename, a checkpoint without
a manifest has lost it by no doing of allstep's, and is not dead but damaged.
"""

from __future__ import annotations

from allstep.checkpoint.layout import MANIFEST, is_temporary, read_name
from allstep.checkpoint.storage import Storage

_TOKEN = "dead"


def remove_checkpoint(storage: Storage, folder: str) -> None:
    """Remove a checkpoint, committed or not."""
    name = read_name(folder)
    if not storage.has_rename:
        storage.remove_file(folder, MANIFEST)
    elif name is not None:
        storage.rename(folder, name.temporary(_TOKEN))
        folder = name.temporary(_TOKEN)
    storage.remove(folder)


def sweep(storage: Storage) -> dict[str, str | None]:
    """Remove the folders of saves that were never committed; their names, with the reason where one could not be."""
    swept: dict[str, str | None] = {}
    for folder in storage.folders():
        if not is_dead(storage, folder):
            continue
        try:
            storage.remove(folder)
            swept[folder] = None
        except Exception as error:  # file systems behind fsspec have errors of their own
            swept[folder] = f"{type(error).__name__}: {error}"
    return swept


def is_dead(storage: Storage, folder: str) -> bool:
    """Whether a folder is a save's that was never committed, or what is left of a checkpoint that was removed."""
    if is_temporary(folder):
        return True
    return not storage.has_rename and read_name(folder) is not None and MANIFEST not in storage.files(folder)
