"""What is in a folder of checkpoints: listing, verification and quarantine.

Contract: for any process at any time, while a run writes there too. The command line uses it, so it imports no torch.
Only `remove`, `quarantine` and `mark_damaged` change anything.

Verification compares a checkpoint with its manifest. "size" looks at the list of files; "full" reads every file and
compares hashes. A file that was read and is wrong is damage. A file that cannot be read, as while a server is away, may
be whole, and is reported apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from allstep.checkpoint.manifest import (
    MANIFEST,
    QUARANTINE,
    CheckpointName,
    Manifest,
    is_temporary,
    load_manifest,
    read_name,
)
from allstep.checkpoint.retention import is_unfinished, remove_checkpoint
from allstep.checkpoint.storage import LocalStorage, Storage, hash_file, open_storage
from allstep.errors import CheckpointError, DamagedCheckpointError, NewerCheckpointError

EntryState = Literal["whole", "damaged", "quarantined", "unfinished", "unreadable", "later format"]
Verify = Literal["full", "size"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint, or what an unfinished save left.

    Attributes:
        folder: where all checkpoints of the run are.
        name: of this one's folder.
        state: "whole" by the sizes of its files; "quarantined" by a run that found it damaged; "unfinished" while it is
            being written, or for ever; "unreadable" now, be it whole or not; of a "later format" than this version's.
        manifest: where it can be read.
        problems: why it is not whole.
    """

    folder: str
    name: str
    state: EntryState
    manifest: Manifest | None = None
    problems: list[str] = field(default_factory=list)


def entries(folder: str) -> list[Entry]:
    """Everything in a folder of checkpoints, the oldest first.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    storage = open_storage(folder)
    try:
        names = [name for name in storage.folders() if is_temporary(name) or is_checkpoint(storage, name)]
    except Exception as error:  # file systems behind fsspec have errors of their own
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    # Those that were given other names, committed ones by their order, then what is unfinished.
    names.sort(key=lambda name: (is_temporary(name), read_name(name) or CheckpointName(0, 0)))
    return [_entry(storage, name) for name in names]


def check_folder(folder: str) -> None:
    """Raise CheckpointError where a path is no folder. What lies behind an address may be empty and no less there."""
    storage = open_storage(folder)
    if isinstance(storage, LocalStorage) and not Path(storage.root).is_dir():
        raise CheckpointError(f"{folder} is no folder; give the one that a run saves its checkpoints to")


def is_checkpoint(storage: Storage, name: str) -> bool:
    """Whether a folder is a checkpoint, under its own name or one that somebody gave it: that has a manifest too."""
    if read_name(name) is not None:
        return True
    try:
        return not is_temporary(name) and MANIFEST in storage.files(name)
    except Exception:  # a folder that is nothing of ours may be closed to us
        return False


def find_entry(folder: str, name: str | None) -> Entry:
    """The checkpoint of a name; without one, the newest that is whole by its sizes.

    Raises:
        CheckpointError: there is none.
    """
    found = entries(folder)
    for entry in reversed(found):
        if entry.name == name or (name is None and entry.state == "whole"):
            return entry
    if name is None:
        raise CheckpointError(f"{folder} has no whole checkpoint; allstep checkpoints ls {folder} shows what is there")
    there = ", ".join(entry.name for entry in found) or "nothing"
    raise CheckpointError(f"{folder} has no checkpoint {name}; there is {there}")


def verify(entry: Entry, how: Verify = "full") -> list[str]:
    """Everything that is wrong with a checkpoint or keeps it from being read; nothing where it is whole."""
    wrong, unread = find_damage(entry, how)
    return [*wrong, *unread]


def find_damage(entry: Entry, how: Verify = "full") -> tuple[list[str], list[str]]:
    """What is wrong with a checkpoint, and what cannot be read of it now, be it whole or not."""
    storage, folder = open_storage(entry.folder), entry.name
    try:
        manifest = load_manifest(storage, folder)
    except DamagedCheckpointError as error:
        return ([], [str(error)]) if isinstance(error, NewerCheckpointError) else ([str(error)], [])
    except CheckpointError as error:
        return [], [str(error)]
    problems = wrong_sizes(storage, folder, manifest)
    # Nothing is read once sizes are wrong: that is damage enough.
    if problems or how == "size":
        return problems, []
    wrong, unread = wrong_hashes(storage, folder, manifest, manifest.files)
    return wrong, list(unread.values())


def mark_damaged(entry: Entry, problems: list[str]) -> None:
    """Have listings and runs know what `verify` found. Raises CheckpointError where nothing can be written there."""
    try:
        quarantine(open_storage(entry.folder), entry.name, "; ".join(problems))
    except Exception as error:
        raise CheckpointError(f"{entry.folder}/{entry.name} cannot be marked as damaged: {error}") from error


def remove(entry: Entry) -> None:
    """Remove a checkpoint, or what an unfinished save left."""
    remove_checkpoint(open_storage(entry.folder), entry.name)


def _entry(storage: Storage, name: str) -> Entry:
    try:
        return _read_entry(storage, name)
    except NewerCheckpointError as error:
        return Entry(storage.root, name, "later format", problems=[str(error)])
    except DamagedCheckpointError as error:
        return Entry(storage.root, name, "damaged", problems=[str(error)])
    except Exception as error:
        return Entry(storage.root, name, "unreadable", problems=[str(error)])


def _read_entry(storage: Storage, name: str) -> Entry:
    if is_unfinished(storage, name):
        return Entry(storage.root, name, "unfinished", problems=["the save was never finished"])
    manifest = load_manifest(storage, name)
    if QUARANTINE in storage.files(name):
        return Entry(storage.root, name, "quarantined", manifest, [f"a run found it damaged; {QUARANTINE} says why"])
    problems = wrong_sizes(storage, name, manifest)
    return Entry(storage.root, name, "damaged" if problems else "whole", manifest, problems)


# Verification


def wrong_sizes(storage: Storage, folder: str, manifest: Manifest) -> list[str]:
    """Files that are missing or have another size than the manifest says."""
    present = storage.files(folder)
    problems = []
    for name, record in manifest.files.items():
        if name not in present:
            problems.append(f"{name} is missing")
        elif present[name] != record.size:
            problems.append(f"{name} has {present[name]} bytes instead of {record.size}")
    return problems


def wrong_hashes(
    storage: Storage, folder: str, manifest: Manifest, names: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """Which of the named files have changed, and, by name, why some cannot be read."""
    problems, unread = [], {}
    for name in names:
        try:
            with storage.open(folder, name) as file:
                digest = hash_file(file)
        except Exception as error:
            unread[name] = f"{name} cannot be read: {error}"
            continue
        if digest != manifest.files[name].hash:
            problems.append(f"{name} has changed since it was written: its hash is {digest}")
    return problems, unread


def quarantine(storage: Storage, folder: str, problem: str) -> None:
    """Mark a checkpoint as damaged, with the reason, so that no run considers it again."""
    note = json.dumps({"problem": problem, "found": time.time()}).encode()
    storage.write(folder, QUARANTINE, [note])
