"""What lies in a folder of checkpoints, as a person or the command line asks for it.

Contract: for any process at any time, while a run writes there too; imports no torch. Nothing is changed but by
`remove`.

Removing checkpoints and what dead attempts left.

Contract: a checkpoint whose removal was cut short is none any more, and is swept away at the next start: it is renamed
to an unfinished save first or, where there is no rename, loses its manifest first. A folder of checkpoints belongs to
one run at a time: `sweep` takes every save that is not committed for dead. Where there is rename, a checkpoint without
a manifest has lost it by no doing of allstep's, and is not dead but damaged.

Whether a checkpoint is whole: its manifest read, and its files compared with what that says.

Contract: nothing is changed here. `size` looks at the list of files, `full` reads them all and compares hashes. What
was read and is wrong is damage; what cannot be read, as while a server is away, may be whole, and is told apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from allstep.checkpoint.manifest import (
    LARGEST_MANIFEST,
    MANIFEST,
    SET_ASIDE,
    Manifest,
    Name,
    is_temporary,
    read_manifest,
    read_name,
)
from allstep.checkpoint.storage import Storage, hash_file, open_storage
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


Verify = Literal["full", "size"]


def load_manifest(storage: Storage, folder: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: there is none, or it is none by what it holds.
        CheckpointError: it cannot be read.
    """
    try:
        size = storage.files(folder).get(MANIFEST)
        if size is None:
            raise DamagedCheckpointError(f"there is no {MANIFEST}")
        if size > LARGEST_MANIFEST:
            raise DamagedCheckpointError(f"{MANIFEST} has {size} bytes, more than any manifest")
        with storage.open(folder, MANIFEST) as file:
            return read_manifest(file.read())
    except DamagedCheckpointError:
        raise
    except Exception as error:  # file systems behind fsspec have errors of their own
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}") from error


def wrong_sizes(storage: Storage, folder: str, manifest: Manifest) -> list[str]:
    """What is wrong with the list of files."""
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
    """What is wrong with the contents of the named files of a checkpoint, and, by name, why some cannot be read."""
    problems, unread = [], {}
    for name in names:
        try:
            with storage.open(folder, name) as file:
                _, digest = hash_file(file)
        except Exception as error:
            unread[name] = f"{name} cannot be read: {error}"
            continue
        if digest != manifest.files[name].hash:
            problems.append(f"{name} has changed since it was written: its hash is {digest}")
    return problems, unread


def examine(storage: Storage, folder: str, verify: Verify) -> list[str]:
    """Everything that is wrong with a checkpoint, or keeps it from being read."""
    try:
        manifest = load_manifest(storage, folder)
    except CheckpointError as error:
        return [str(error)]
    problems = wrong_sizes(storage, folder, manifest)
    if problems or verify == "size":
        return problems
    wrong, unread = wrong_hashes(storage, folder, manifest, manifest.files)
    return [*wrong, *unread.values()]
