"""Which checkpoints stay, and how the others are removed.

Contract: a run's store asks after a commit and at no other time. Nothing here imports torch: the command line removes
checkpoints too.

A removal that is cut short never leaves half a checkpoint: the folder is renamed to an unfinished save first or, where
there is no rename, loses its manifest first. The next start removes the rest. A folder of checkpoints belongs to one
run at a time, so `remove_unfinished` takes every save that is not committed for one whose process has ended. Where
there is rename, a checkpoint without its manifest was committed once, so it counts as damaged and not as unfinished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from allstep.checkpoint.storage import Storage
from allstep.errors import ArgumentError, CheckpointError

KeepBest = tuple[int, str, Literal["max", "min"]]


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
