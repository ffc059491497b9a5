"""Checkpoints: what is saved of a run, how it is written, committed, verified, chosen, removed and read.

From a training script down to the disk: `checkpoint` (what attaches to an engine) asks `save_schedule` when,
`collection` (`references`, `objects`) and `rng` what; `store` takes a `snapshot` (`encoding`, `sharding`,
`safetensors_file`) and has `commit` write it through `storage`, in the thread of a `pending_save`. On the way back
`selection` chooses, `reading` reads. `manifest` and `catalog` say what is in a folder, `owner` whose it is, `retention`
what stays there. `torch_private` holds the names that torch does not promise to keep.

Not here: where an engine stands and how it goes on (`allstep.engine`), what metrics save of themselves
(`allstep.metrics`), and the command line (`allstep.cli`).

Training scripts use `allstep.Checkpoint`. `Store` and `PendingSave` are for loops without an engine. A `Storage` is
where a store writes. `entries`, `find_entry`, `verify`, `remove` and `export` are for looking at a folder. Names are
imported when first used: listing and verifying a folder needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from allstep.checkpoint.catalog import Entry, entries, find_entry, remove, verify
    from allstep.checkpoint.checkpoint import Checkpoint
    from allstep.checkpoint.exporting import export
    from allstep.checkpoint.manifest import Manifest
    from allstep.checkpoint.objects import PerRank
    from allstep.checkpoint.pending_save import PendingSave
    from allstep.checkpoint.selection import Found
    from allstep.checkpoint.storage import Buffer, FsspecStorage, LocalStorage, Storage
    from allstep.checkpoint.store import Loaded, Store

_HOMES = {
    "Buffer": "storage",
    "Checkpoint": "checkpoint",
    "Entry": "catalog",
    "Found": "selection",
    "FsspecStorage": "storage",
    "Loaded": "store",
    "LocalStorage": "storage",
    "Manifest": "manifest",
    "PendingSave": "pending_save",
    "PerRank": "objects",
    "Storage": "storage",
    "Store": "store",
    "entries": "catalog",
    "export": "exporting",
    "find_entry": "catalog",
    "remove": "catalog",
    "verify": "catalog",
}

__all__ = [
    "Buffer",
    "Checkpoint",
    "Entry",
    "Found",
    "FsspecStorage",
    "Loaded",
    "LocalStorage",
    "Manifest",
    "PendingSave",
    "PerRank",
    "Storage",
    "Store",
    "entries",
    "export",
    "find_entry",
    "remove",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
