"""What lies in a folder of checkpoints, as a person or the command line asks for it.

Contract: for any process at any time, while a run writes there too; imports no torch. Nothing is changed but by
`remove`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from allstep.checkpoint.layout import SET_ASIDE, Name, is_temporary, read_name
from allstep.checkpoint.manifest import Manifest
from allstep.checkpoint.remote import open_storage
from allstep.checkpoint.removal import is_dead, remove_checkpoint
from allstep.checkpoint.storage import Storage
from allstep.checkpoint.verifying import Verify, examine, load_manifest, wrong_sizes
from allstep.errors import CheckpointError, DamagedCheckpointError, NewerCheckpointError

State = Literal["whole", "damaged", "set aside", "unfinished", "unreadable", "later format"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint, or what a save left.

    Attributes:
        folder: where all checkpoints of the run are.
        name: of this one's folder.
        state: "whole" by the sizes of its files; "set aside" by a run that found it damaged; "unfinished" while it is
            being written, or for ever; "unreadable" now, be it whole or not; of a "later format" than this version's.
        manifest: where it can be read.
        problems: why it is not whole.
    """

    folder: str
    name: str
    state: State
    manifest: Manifest | None = None
    problems: list[str] = field(default_factory=list)


def entries(folder: str) -> list[Entry]:
    """Everything in a folder of checkpoints, the oldest first.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    storage = open_storage(folder)
    try:
        names = [name for name in storage.folders() if read_name(name) or is_temporary(name)]
    except Exception as error:  # file systems behind fsspec have errors of their own
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    names.sort(key=lambda name: (is_temporary(name), read_name(name) or Name(0, 0)))
    return [_entry(storage, name) for name in names]


def verify(entry: Entry, how: Verify = "full") -> list[str]:
    """Everything that is wrong with a checkpoint; nothing where it is whole."""
    return examine(open_storage(entry.folder), entry.name, how)


def remove(entry: Entry) -> None:
    """Remove a checkpoint, or what a save left."""
    remove_checkpoint(open_storage(entry.folder), entry.name)


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


def committed(storage: Storage) -> list[tuple[Name, Manifest]]:
    """All checkpoints whose manifest can be read and that are not set aside, the oldest first."""
    found = []
    for folder in storage.folders():
        name = read_name(folder)
        if name is None or SET_ASIDE in storage.files(folder):
            continue
        try:
            found.append((name, load_manifest(storage, folder)))
        except CheckpointError:
            continue
    return sorted(found, key=lambda entry: entry[0])


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
    if is_dead(storage, name):
        return Entry(storage.root, name, "unfinished", problems=["the save was never finished"])
    manifest = load_manifest(storage, name)
    if SET_ASIDE in storage.files(name):
        return Entry(storage.root, name, "set aside", manifest, [f"a run found it damaged; {SET_ASIDE} says why"])
    problems = wrong_sizes(storage, name, manifest)
    return Entry(storage.root, name, "damaged" if problems else "whole", manifest, problems)
