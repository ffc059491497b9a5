"""Whether a checkpoint is whole: its manifest read, and its files compared with what that says.

Contract: nothing is changed here. `size` looks at the list of files, `full` reads them all and compares hashes. What
was read and is wrong is damage; what cannot be read, as while a server is away, may be whole, and is told apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from allstep.checkpoint.hashing import hash_file
from allstep.checkpoint.layout import MANIFEST
from allstep.checkpoint.manifest import LARGEST_MANIFEST, Manifest, read_manifest
from allstep.checkpoint.storage import Storage
from allstep.errors import CheckpointError, DamagedCheckpointError

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
