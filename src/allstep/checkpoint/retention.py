"""Which checkpoints stay, and how the others are removed.

Contract: a run's store asks after a commit and at no other time. Nothing here imports torch: the command line removes
checkpoints too.

Only saves of a run's own lineage are counted and removed: those that its present state came from. A run that begins
anew beside older saves, or goes on from one of them and leaves later ones aside, keeps those that are not its own.

A removal that is cut short never leaves half a checkpoint: the folder is renamed to an unfinished save first or, where
there is no rename, loses its manifest first. The next owner removes the rest. Only the owner of a folder calls
`remove_unfinished` (see `owner`), before its own first save, so every save that is not committed is of a job that has
ended or lost the folder. Where there is rename, a checkpoint without its manifest was committed once, so it counts as
damaged and not as unfinished.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from allstep.checkpoint.manifest import (
    MANIFEST,
    QUARANTINE,
    Branch,
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


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which saves of a folder a run's next save comes from.

    Attributes:
        parent: the save before it; see `Manifest`.
        branches: finished lines that lead to it, each with its last save that does.
        own: the line that it goes on.
    """

    parent: str | None
    branches: tuple[Branch, ...]
    own: str

    @staticmethod
    def new() -> Lineage:
        """Of a run that came from no save."""
        return Lineage(None, (), secrets.token_hex(8))

    @staticmethod
    def of(root: str, name: str, manifest: Manifest, folder: str, next_order: int) -> Lineage:
        """Of a run that goes on from a save.

        Args:
            root: where that save is.
            name: of its folder.
            manifest: of it.
            folder: where the run saves.
            next_order: the order of the run's first save there.
        """
        if root != folder:
            return replace(Lineage.new(), parent=f"{root}/{name}")
        *before, last = manifest.lineage or (Branch(id="", through=manifest.order),)
        if manifest.order == next_order - 1 and last.id:
            return Lineage(name, tuple(before), last.id)  # nothing else came after it: its line simply goes on
        return Lineage(name, (*before, Branch(id=last.id, through=manifest.order)), secrets.token_hex(8))

    def at(self, order: int) -> tuple[Branch, ...]:
        """What the manifest of a save of this order says."""
        return (*self.branches, Branch(id=self.own, through=order))

    def has(self, manifest: Manifest) -> bool:
        """Whether a save is one that this run's state came from."""
        line = manifest.lineage[-1].id if manifest.lineage else ""
        through = {branch.id: branch.through for branch in self.branches}
        return line == self.own or manifest.order <= through.get(line, -1)


def remove_expendable(storage: Storage, retention: Retention, lineage: Lineage) -> None:
    """Remove the checkpoints of a lineage that retention does not keep. Asked after a commit and at no other time."""
    own = [(name, manifest) for name, manifest in _committed(storage) if lineage.has(manifest)]
    for name in retention.expendable(own):
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
    if not storage.has_rename:
        storage.remove_file(folder, MANIFEST)
    elif not is_temporary(folder):
        # One that somebody has given another name has no order of its own any more.
        name = read_name(folder) or CheckpointName(0, 0)
        removed = name.temporary(_REMOVED_TOKEN if name.order else secrets.token_hex(8))
        storage.rename(folder, removed)
        folder = removed
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
