"""What is in a folder of checkpoints: listing, verification, quarantine, retention and removal.

Contract: for any process at any time, while a run writes there too. The command line uses it, so it imports no torch.
Only `remove`, `remove_checkpoint`, `remove_unfinished`, `remove_expendable` and `quarantine` change anything.

Verification compares a checkpoint with its manifest. "size" looks at the list of files; "full" reads every file and
compares hashes. A file that was read and is wrong is damage. A file that cannot be read, as while a server is away, may
be whole, and is reported apart.

A removal that is cut short never leaves half a checkpoint: the folder is renamed to an unfinished save first or, where
there is no rename, loses its manifest first. The next start removes the rest. A folder of checkpoints belongs to one
run at a time, so `remove_unfinished` takes every save that is not committed for one whose process has ended. Where
there is rename, a checkpoint without its manifest was committed once, so it counts as damaged and not as unfinished.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from allstep.checkpoint.manifest import (
    LARGEST_MANIFEST,
    MANIFEST,
    QUARANTINE,
    CheckpointName,
    Manifest,
    is_temporary,
    read_manifest,
    read_name,
)
from allstep.checkpoint.storage import Storage, hash_file, open_storage
from allstep.errors import ArgumentError, CheckpointError, DamagedCheckpointError, NewerCheckpointError

EntryState = Literal["whole", "damaged", "quarantined", "unfinished", "unreadable", "later format"]
Verify = Literal["full", "size"]
KeepBest = tuple[int, str, Literal["max", "min"]]


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
        names = [name for name in storage.folders() if read_name(name) or is_temporary(name)]
    except Exception as error:  # file systems behind fsspec have errors of their own
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    # Committed ones by their order, then what is unfinished.
    names.sort(key=lambda name: (is_temporary(name), read_name(name) or CheckpointName(0, 0)))
    return [_entry(storage, name) for name in names]


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
    """Everything that is wrong with a checkpoint; nothing where it is whole."""
    return find_problems(open_storage(entry.folder), entry.name, how)


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


def load_manifest(storage: Storage, folder: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: there is none, or its contents are no manifest.
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


def find_problems(storage: Storage, folder: str, how: Verify) -> list[str]:
    """Everything that is wrong with a checkpoint, or keeps it from being read."""
    try:
        manifest = load_manifest(storage, folder)
    except CheckpointError as error:
        return [str(error)]
    problems = wrong_sizes(storage, folder, manifest)
    # Nothing is read once sizes are wrong: that is damage enough.
    if problems or how == "size":
        return problems
    wrong, unread = wrong_hashes(storage, folder, manifest, manifest.files)
    return [*wrong, *unread.values()]


def quarantine(storage: Storage, folder: str, problem: str) -> None:
    """Mark a checkpoint as damaged, with the reason, so that no run considers it again."""
    note = json.dumps({"problem": problem, "found": time.time()}).encode()
    storage.write(folder, QUARANTINE, [note])


# Retention


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints stay: the newest, and the best by a metric. `keep_last=None` keeps all.

    Raises:
        ArgumentError: a number is less than 1, or `keep_best` is not (count, name of a metric, "max" or "min").
    """

    keep_last: int | None = 3
    keep_best: KeepBest | None = None

    def __post_init__(self) -> None:
        if self.keep_last is not None and not _is_count(self.keep_last):
            raise ArgumentError(f"keep_last is {self.keep_last!r}; it must be 1 or more, or None to keep all")
        if self.keep_best is not None and not _is_keep_best(self.keep_best):
            raise ArgumentError(
                f'keep_best is {self.keep_best!r}; give (1 or more, the name of a metric, "max" or "min")'
            )

    def expendable(self, committed: Sequence[tuple[CheckpointName, Manifest]]) -> list[CheckpointName]:
        """Those to remove, oldest first. A missing or NaN metric is never among the best; a tie goes to the older."""
        if self.keep_last is None:
            return []
        ordered = sorted(committed, key=lambda entry: entry[0])
        # Order counts saves, so the newest is the last saved, also after a run went back to an earlier step.
        kept = {name for name, _ in ordered[-self.keep_last :]}
        if self.keep_best is not None:
            count, metric, direction = self.keep_best
            sign = 1 if direction == "max" else -1
            # From the newest to the oldest: the sort is stable, so of equal ones the oldest comes last and stays.
            rated = [
                (sign * manifest.metrics[metric], name)
                for name, manifest in reversed(ordered)
                if not math.isnan(manifest.metrics.get(metric, math.nan))
            ]
            kept.update(name for _, name in sorted(rated, key=lambda entry: entry[0])[-count:])
        return [name for name, _ in ordered if name not in kept]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_keep_best(value: object) -> bool:
    if not isinstance(value, Sequence) or len(value) != 3:
        return False
    count, metric, direction = value
    return _is_count(count) and isinstance(metric, str) and direction in ("max", "min")


def remove_expendable(storage: Storage, retention: Retention) -> None:
    """Remove the checkpoints that retention does not keep. Asked after a commit and at no other time."""
    for name in retention.expendable(_committed(storage)):
        remove_checkpoint(storage, str(name))


def _committed(storage: Storage) -> list[tuple[CheckpointName, Manifest]]:
    """All checkpoints whose manifest can be read and that are not quarantined."""
    found = []
    for folder in storage.folders():
        name = read_name(folder)
        if name is None or QUARANTINE in storage.files(folder):
            continue
        try:
            found.append((name, load_manifest(storage, folder)))
        except CheckpointError:
            continue  # one that may be whole another time is neither counted nor removed
    return found


# Removal

_REMOVED_TOKEN = "dead"  # hexadecimal, as `CheckpointName.temporary` asks


def remove_checkpoint(storage: Storage, folder: str) -> None:
    """Remove a checkpoint, committed or not."""
    name = read_name(folder)
    if not storage.has_rename:
        storage.remove_file(folder, MANIFEST)
    elif name is not None:
        storage.rename(folder, name.temporary(_REMOVED_TOKEN))
        folder = name.temporary(_REMOVED_TOKEN)
    storage.remove_folder(folder)


def remove_unfinished(storage: Storage) -> dict[str, str | None]:
    """Remove the folders of saves that were never committed; their names, with the reason where one could not be."""
    removed: dict[str, str | None] = {}
    for folder in storage.folders():
        if not is_unfinished(storage, folder):
            continue
        try:
            storage.remove_folder(folder)
            removed[folder] = None
        except Exception as error:  # file systems behind fsspec have errors of their own
            removed[folder] = f"{type(error).__name__}: {error}"
    return removed


def is_unfinished(storage: Storage, folder: str) -> bool:
    """Whether a folder is of a save that was never committed, or is left of a checkpoint that was removed."""
    if is_temporary(folder):
        return True
    return not storage.has_rename and read_name(folder) is not None and MANIFEST not in storage.files(folder)
