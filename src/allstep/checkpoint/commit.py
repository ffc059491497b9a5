"""How a save becomes a checkpoint, or leaves no trace.

A `Save` is the one record of a save on a rank. The store makes it, puts the rank's snapshot in, and hands it to
`write_save` in a thread of its own, which notes in it how the save ended.

Contract: every rank calls `write_save` with its `Save`, over a coordinator that nothing else uses. The ranks meet
three times.

1. Before anything is written. Do all save the same step, has every rank a snapshot, of the same tensors, and is there
   space for all on the disk? Rank 0 owns the folder of checkpoints and has made a new one in it. One rank's no is
   everyone's. Where a rank knew that the run has failed when the state was copied, the save is withheld.
2. Each rank writes its files, hashes them on the way, synchronises them, and reports their sizes, hashes and pieces.
   One rank's failure is everyone's.
3. Rank 0 checks that it sees all files at their sizes, writes `state.json`, then the manifest, synchronises the folder
   and renames it. Where there is no rename, the manifest's arrival has committed. All are told the outcome.

Where it fails, rank 0 removes the folder, and `Save.error` is the same on every rank. A rank that dies leaves the
folder to the next owner. Once it is committed it has not failed: a rank that is not told looks for itself.

No other checkpoint is touched before the commit. After it, rank 0 removes the checkpoints of the run's own lineage that
retention does not keep, unless a rank has come to know meanwhile that the run has failed. A failure to remove is logged
and fails nothing.
"""

from __future__ import annotations

import logging
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from allstep.checkpoint.encoding import Chunk, StateFile, TensorRecord, write_state_file
from allstep.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    CheckpointName,
    FileRecord,
    Manifest,
    load_manifest,
    tensor_file,
    value_file,
    write_manifest,
)
from allstep.checkpoint.owner import Ownership
from allstep.checkpoint.retention import Lineage, Retention, remove_checkpoint, remove_expendable
from allstep.checkpoint.sharding import Box, Piece, whole_box
from allstep.checkpoint.snapshot import Snapshot, TensorSpec
from allstep.checkpoint.storage import BlockHasher, Buffer, Storage, hash_bytes, in_words
from allstep.coordination import Coordinator
from allstep.errors import CheckpointError, FolderLostError
from allstep.version import __version__
from allstep.world.bounded_store import poll

log = logging.getLogger("allstep.checkpoint")

_LOOKS_S = 10.0  # for what another rank has written, or committed, to be seen
_DISK_MARGIN = 1 << 20  # bytes, for the JSON files and the folder itself
_NAMES_SHOWN = 3  # names of tensors in a message


@dataclass(slots=True)
class Save:
    """One save, on one rank: what is to be written, and how it ended.

    Attributes:
        name: of the checkpoint, the same on all ranks.
        folder: what is written to: the checkpoint's own or, where there is rename, a temporary one.
        metrics: numbers by name, for the manifest.
        facts: what else the manifest says.
        lineage: which saves it comes from; rank 0's counts.
        distrust: why the run's state is not to be trusted any more, as far as this rank knows; asked from the thread
            that writes.
        distrusted: what it said when the state was copied.
        said_before: why the save before failed; the same reason is not told at length again.
        snapshot: this rank's part of the state.
        refusal: why this rank has no snapshot, which fails the save on all.
        manifest: of the checkpoint, once it is committed; rank 0's on every rank.
        withheld: why it was not to be committed, where that is no failure of the save.
        error: why the save failed, once it has; the same on every rank.
        reason: the same without the step.
    """

    name: CheckpointName
    folder: str
    metrics: dict[str, float]
    facts: dict[str, Any]
    lineage: Lineage
    distrust: Callable[[], str | None] = lambda: None
    distrusted: str | None = None
    said_before: str | None = None
    snapshot: Snapshot | None = None
    refusal: str | None = None
    manifest: Manifest | None = None
    withheld: str | None = None
    error: CheckpointError | None = None
    reason: str | None = None

    def failure(self, why: object, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
        """The error that says that this save failed, and why; it is noted."""
        self.reason = str(why)
        self.error = kind(f"step {self.name.step} was not saved: {why}")
        return self.error


@dataclass(frozen=True, slots=True)
class _ReadyReport:
    """What a rank says before anything is written."""

    name: CheckpointName
    refusal: str | None
    distrust: str | None
    size: int
    free: int | None
    specs_hash: str


@dataclass(frozen=True, slots=True)
class _WriteReport:
    """What a rank says of its files."""

    failure: str | None
    distrust: str | None
    files: dict[str, FileRecord]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class _NotCommitted:
    """Why rank 0 did not commit, and whether that is for the loss of the folder to another job."""

    why: str
    is_lost: bool = False


def write_save(
    save: Save, storage: Storage, coordinator: Coordinator, retention: Retention, ownership: Ownership | None
) -> None:
    """Write a save together with the other ranks, note in it how it ended, and remove what is no longer kept.

    Args:
        save: this rank's record of it.
        storage: the folder of checkpoints.
        coordinator: of the ranks that save.
        retention: which checkpoints stay.
        ownership: rank 0's hold on the folder; None on the others.
    """
    try:
        is_trusted = _commit(save, storage, coordinator, ownership)
    except CheckpointError:
        pass  # noted by `failure`
    except Exception as error:
        save.failure(in_words(error, storage.root)).__cause__ = error
    if coordinator.rank == 0 or (save.error is not None and save.error.__cause__ is not None):
        _tell(save, coordinator.rank)
    if save.manifest is not None and is_trusted and ownership is not None:
        try:
            ownership.check()
            remove_expendable(storage, retention, save.lineage)
        except Exception as error:
            log.warning("old checkpoints in %s could not be removed: %s", storage.root, error)


def _tell(save: Save, rank: int) -> None:
    """What all ranks know is said by rank 0, and what one rank alone has met by that one."""
    if save.withheld is not None:
        log.warning("step %d is not saved: %s", save.name.step, save.withheld)
    elif save.error is not None and save.reason == save.said_before:
        log.error("step %d was not saved either, for the same reason", save.name.step)
    elif save.error is not None:
        log.error("%s (rank %d)", save.error, rank)


def _commit(save: Save, storage: Storage, coordinator: Coordinator, ownership: Ownership | None) -> bool:
    """Write a checkpoint and note its manifest, or that it is withheld; whether all ranks trust the run's state still.

    Raises:
        CheckpointError: it was not committed; on every rank alike.
    """
    # For the removal below: another run's folder of that name must not be removed, nor one that is committed.
    has_folder = False
    try:
        refusal = save.refusal
        if refusal is None and coordinator.rank == 0:
            refusal = _make_folder(save, storage)
            has_folder = refusal is None
        if not _agree_to_write(save, refusal, storage, coordinator):
            return False
        reports: list[_WriteReport] = coordinator.gather(_write_own_files(save, storage, coordinator.rank))
        _raise_first([report.failure for report in reports], save)
        outcome: Manifest | _NotCommitted = _NotCommitted("rank 0 has not committed it")
        if coordinator.rank == 0:
            outcome = _finish(save, storage, reports, ownership)
            save.manifest = outcome if isinstance(outcome, Manifest) else None  # before the broadcast, which may fail
        outcome = coordinator.broadcast(outcome, 0)
        if isinstance(outcome, _NotCommitted):
            raise save.failure(outcome.why, FolderLostError if outcome.is_lost else CheckpointError)
        save.manifest = outcome
        return all(report.distrust is None for report in reports)
    except CheckpointError:
        raise
    except Exception as error:
        if save.manifest is None:
            poll(lambda: _is_there(save, storage), time.monotonic() + _LOOKS_S)
        if save.manifest is None:
            raise save.failure(f"the ranks lost each other: {error}") from error
        log.warning("step %d was saved, and then the ranks lost each other: %s", save.name.step, error)
        return False
    finally:
        if has_folder and save.manifest is None:
            _discard(save, storage)


def _is_there(save: Save, storage: Storage) -> bool:
    """Whether rank 0 has committed the save and could not say so any more; its name is used for no other."""
    with suppress(Exception):
        save.manifest = load_manifest(storage, str(save.name))
    return save.manifest is not None


# 1. Before anything is written


def _make_folder(save: Save, storage: Storage) -> str | None:
    """Make the folder; return why it cannot be."""
    try:
        storage.make_folder(save.folder)
    except Exception as error:  # file systems behind fsspec have errors of their own, here and below
        return f"no folder can be made in {storage.root}: {in_words(error, storage.root)}"
    return None


def _agree_to_write(save: Save, refusal: str | None, storage: Storage, coordinator: Coordinator) -> bool:
    """Whether to write; where that is for no failure, why not is noted."""
    free: int | None = None
    if coordinator.rank == 0:  # which alone knows that what it removed of earlier saves is gone
        try:
            free = storage.free_bytes()
        except Exception as error:
            refusal = refusal or f"the disk's free space is unknown: {error}"
    specs = save.snapshot.specs if save.snapshot is not None else {}
    size = save.snapshot.file.size if save.snapshot is not None else 0
    # Only a hash of the specs is sent at first, for they may be many and are nearly always the same.
    specs_hash = hash_bytes(repr(sorted(specs.items())).encode())
    reports: list[_ReadyReport] = coordinator.gather(
        _ReadyReport(save.name, refusal, save.distrusted, size, free, specs_hash)
    )
    _raise_first([_other_save(each.name, reports[0].name) or each.refusal for each in reports], save)
    for rank, report in enumerate(reports):
        if report.distrust is not None:
            save.withheld = f"rank {rank} says that the run has failed: {report.distrust}"
            return False
    if len({each.specs_hash for each in reports}) > 1:
        raise save.failure(_difference(coordinator.gather(specs)))
    # All write to one disk, and rank 0's answer about it counts.
    need = sum(each.size for each in reports) + _DISK_MARGIN
    free = reports[0].free
    if free is not None and free < need:
        raise save.failure(
            f"it needs {need / 1e6:,.1f} MB and {storage.root} has {free / 1e6:,.1f} MB left; free some space, or keep "
            "fewer checkpoints"
        )
    return True


def _other_save(name: CheckpointName, of_rank_zero: CheckpointName) -> str | None:
    if name == of_rank_zero:
        return None
    return f"it saves {name}, and rank 0 {of_rank_zero}; call save on every rank, at the same point"


def _difference(all_specs: Sequence[Mapping[str, TensorSpec]]) -> str:
    first = all_specs[0].items()
    for rank, specs in enumerate(all_specs):
        names = sorted({name for name, _ in first ^ specs.items()})
        if names:
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
            return f"rank {rank} has other tensors to save than rank 0 ({shown}); give the same state on all ranks"
    return "ranks have different tensors to save"


def _raise_first(failures: Sequence[str | None], save: Save) -> None:
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise save.failure(f"rank {rank}: {failure}")


# 2. Each rank writes its files


def _write_own_files(save: Save, storage: Storage, rank: int) -> _WriteReport:
    snapshot = save.snapshot
    assert snapshot is not None  # a rank without one refused, and no rank writes then
    files: dict[str, FileRecord] = {}
    try:
        own_values = StateFile(
            tensors={
                name: TensorRecord(
                    dtype=dtype,
                    shape=shape,
                    strides=snapshot.strides.get(name),
                    chunks=(_chunk(tensor_file(rank), whole_box(shape)),),
                )
                for name, (dtype, shape) in snapshot.per_rank_specs.items()
            },
            value=snapshot.per_rank,
        )
        files[tensor_file(rank)] = _write(save, storage, tensor_file(rank), snapshot.file.header, snapshot.file.data)
        files[value_file(rank)] = _write(save, storage, value_file(rank), write_state_file(own_values))
    except FileNotFoundError:
        return _WriteReport(
            f"it does not see the folder that rank 0 made in {storage.root} (on {socket.gethostname()}); checkpoints "
            "need a folder that all ranks share, such as one on a network file system",
            None,
            {},
            (),
        )
    except Exception as error:
        return _WriteReport(in_words(error, storage.root), None, {}, ())
    return _WriteReport(None, save.distrust(), files, snapshot.pieces)


def _write(save: Save, storage: Storage, name: str, *parts: Buffer) -> FileRecord:
    hasher = BlockHasher()
    storage.write(save.folder, name, hasher.blocks(*parts))
    return FileRecord(size=hasher.size, hash=hasher.hexdigest)


def _chunk(file: str, box: Box) -> Chunk:
    return Chunk(file=file, offsets=box.offsets, sizes=box.sizes)


# 3. Rank 0 commits


def _finish(
    save: Save, storage: Storage, reports: Sequence[_WriteReport], ownership: Ownership | None
) -> Manifest | _NotCommitted:
    """Write `state.json` and the manifest and commit; return why not."""
    assert save.snapshot is not None
    assert ownership is not None
    try:
        # A file that rank 0 does not see at its size means separate disks, or a network file system that lags.
        files = {name: record for report in reports for name, record in report.files.items()}
        common = StateFile(tensors=_tensor_records(save.snapshot, reports), value=save.snapshot.state)
        if (problem := common.problem() or _unseen(storage, save.folder, files)) is not None:
            return _NotCommitted(problem)
        files[STATE] = _write(save, storage, STATE, write_state_file(common))
        manifest = _manifest(save, len(reports), files)
        ownership.check()  # as late as can be: from here on it may become a checkpoint
        storage.sync_folder(save.folder)  # before the manifest, which must not survive a loss of power without the rest
        storage.write(save.folder, MANIFEST, [write_manifest(manifest)])
        storage.sync_folder(save.folder)
        if storage.has_rename:
            storage.rename(save.folder, str(save.name))
    except Exception as error:
        return _NotCommitted(in_words(error, storage.root), isinstance(error, FolderLostError))
    return manifest


def _tensor_records(snapshot: Snapshot, reports: Sequence[_WriteReport]) -> dict[str, TensorRecord]:
    chunks: dict[str, list[Chunk]] = {name: [] for name in snapshot.specs}
    for rank, report in enumerate(reports):
        for piece in report.pieces:
            chunks[piece.name].append(_chunk(tensor_file(rank), piece.box))
    return {
        name: TensorRecord(dtype=dtype, shape=shape, strides=snapshot.strides.get(name), chunks=tuple(chunks[name]))
        for name, (dtype, shape) in snapshot.specs.items()
    }


def _unseen(storage: Storage, folder: str, files: Mapping[str, FileRecord]) -> str | None:
    """What rank 0 does not see of what all have written, once it has had time to: a network shows files late."""
    present: dict[str, int] = {}

    def sees_all() -> bool:
        nonlocal present
        present = storage.files(folder)
        return all(present.get(name) == record.size for name, record in files.items())

    # One look may take longer than all the time there is, and then tells only what was there when it began.
    if not poll(sees_all, time.monotonic() + _LOOKS_S):
        sees_all()
    for name, record in files.items():
        if present.get(name) != record.size:
            return (
                f"rank 0 sees {present.get(name, 'nothing')} of {name}'s {record.size} bytes in {storage.root}; "
                "checkpoints need a folder that all ranks share"
            )
    return None


def _manifest(save: Save, world_size: int, files: Mapping[str, FileRecord]) -> Manifest:
    return Manifest(
        format=FORMAT,
        order=save.name.order,
        step=save.name.step,
        world_size=world_size,
        created=time.time(),
        versions={"allstep": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        metrics=dict(save.metrics),
        facts=dict(save.facts),
        files=dict(files),
        parent=save.lineage.parent,
        lineage=save.lineage.at(save.name.order),
    )


def _discard(save: Save, storage: Storage) -> None:
    try:
        remove_checkpoint(storage, save.folder)
    except Exception:
        return  # the next start removes it
