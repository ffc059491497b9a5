"""Checkpoints: how they are written, committed, kept, chosen, verified and read.

Names are imported when first used: listing and verifying a folder needs no torch.
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
    from allstep.checkpoint.selection import Found
    from allstep.checkpoint.store import Loaded, Pending, Store

_HOMES = {
    "Checkpoint": "checkpoint",
    "Entry": "catalog",
    "Found": "selection",
    "Loaded": "store",
    "PerRank": "objects",
    "Manifest": "manifest",
    "Pending": "store",
    "Store": "store",
    "entries": "catalog",
    "export": "exporting",
    "find_entry": "catalog",
    "remove": "catalog",
    "verify": "catalog",
}

__all__ = [
    "Checkpoint",
    "Entry",
    "Found",
    "Loaded",
    "Manifest",
    "Pending",
    "PerRank",
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
