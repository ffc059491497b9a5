"""How a save becomes a checkpoint, or leaves no trace.

A `Save` is the one record of a save on a rank. The store makes it, puts the rank's snapshot in, and hands it to
`write_save` in a thread of its own, which notes in it how the save ended.

Contract: every rank calls `write_save` with its `Save`, over a coordinator that nothing else uses. The ranks meet
three times.

1. Before anything is written. Do all save the same step, has every rank a snapshot, of the same tensors, and is there
   space for all on the disk? Rank 0 has made a new folder. One rank's no is everyone's.
2. Each rank writes its files, hashes them on the way, synchronises them, and reports their sizes, hashes and pieces.
   One rank's failure is everyone's.
3. Rank 0 checks that it sees all files at their sizes, writes `state.json`, then the manifest, synchronises the folder
   and renames it. Where there is no rename, the manifest's arrival has committed. All are told the outcome.

Where it fails, rank 0 removes the folder, and `Save.error` is the same on every rank. A rank that dies leaves the
folder to the next start. No other checkpoint is touched before the commit. After it, rank 0 removes the checkpoints
that retention does not keep; a failure there is logged and fails nothing.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping, Sequence
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
    tensor_file,
    value_file,
    write_manifest,
)
from allstep.checkpoint.retention import Retention, remove_checkpoint, remove_expendable
from allstep.checkpoint.sharding import Box, Piece, whole_box
from allstep.checkpoint.snapshot import Snapshot, TensorSpec
from allstep.checkpoint.storage import BlockHasher, Buffer, Storage, hash_bytes
from allstep.coordination import Coordinator
from allstep.errors import CheckpointError
from allstep.version import __version__

log = logging.getLogger("allstep.checkpoint")

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
        snapshot: this rank's part of the state.
        refusal: why this rank has no snapshot, which fails the save on all.
        manifest: of the checkpoint, once it is committed; rank 0's on every rank.
        error: why the save failed, once it has; the same on every rank.
    """

    name: CheckpointName
    folder: str
    metrics: dict[str, float]
    facts: dict[str, Any]
    snapshot: Snapshot | None = None
    refusal: str | None = None
    manifest: Manifest | None = None
    error: CheckpointError | None = None

    def failure(self, why: object) -> CheckpointError:
        """The error that says that this save failed, and why."""
        return CheckpointError(f"step {self.name.step} was not saved: {why}")


@dataclass(frozen=True, slots=True)
class _ReadyReport:
    """What a rank says before anything is written."""

    name: CheckpointName
    refusal: str | None
    size: int
    free: int | None
    specs_hash: str


@dataclass(frozen=True, slots=True)
class _WriteReport:
    """What a rank says of its files."""

    failure: str | None
    files: dict[str, FileRecord]
    pieces: tuple[Piece, ...]


def write_save(save: Save, storage: Storage, coordinator: Coordinator, retention: Retention) -> None:
    """Write a save together with the other ranks, note in it how it ended, and remove what is no longer kept."""
    try:
        save.manifest = _commit(save, storage, coordinator)
    except CheckpointError as error:
        save.error = error
    except Exception as error:
        save.error = save.failure(f"{type(error).__name__}: {error}")
        save.error.__cause__ = error
    if save.error is not None:
        log.error("%s (rank %d)", save.error, coordinator.rank)
    elif coordinator.rank == 0:
        try:
            remove_expendable(storage, retention)
        except Exception as error:
            log.warning("old checkpoints in %s could not be removed: %s", storage.root, error)


def _commit(save: Save, storage: Storage, coordinator: Coordinator) -> Manifest:
    """Write a checkpoint and return its manifest, on every rank.

    Raises:
        CheckpointError: it was not committed; on every rank alike.
    """
    # For the removal below: another run's folder of that name must not be removed, nor one that is committed.
    has_folder = False
    committed = False
    try:
        refusal = save.refusal
        if refusal is None and coordinator.rank == 0:
            refusal = _make_folder(save, storage)
            has_folder = refusal is None
        _agree_to_write(save, refusal, storage, coordinator)
        reports: list[_WriteReport] = coordinator.gather(_write_own_files(save, storage, coordinator.rank))
        _raise_first([report.failure for report in reports], save)
        outcome: Manifest | str = "rank 0 has not committed it"
        if coordinator.rank == 0:
            outcome = _finish(save, storage, reports)
        committed = isinstance(outcome, Manifest)  # before the broadcast, which may fail
        outcome = coordinator.broadcast(outcome, 0)
        if isinstance(outcome, str):
            raise save.failure(outcome)
        return outcome
    except (RuntimeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise save.failure(f"the ranks lost each other: {error}") from error
    finally:
        if has_folder and not committed:
            _discard(save, storage)


# 1. Before anything is written


def _make_folder(save: Save, storage: Storage) -> str | None:
    """Make the folder; return why it cannot be."""
    try:
        storage.make_folder(save.folder)
    except Exception as error:  # file systems behind fsspec have errors of their own, here and below
        return f"no folder can be made in {storage.root}: {error}"
    return None


def _agree_to_write(save: Save, refusal: str | None, storage: Storage, coordinator: Coordinator) -> None:
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
    reports: list[_ReadyReport] = coordinator.gather(_ReadyReport(save.name, refusal, size, free, specs_hash))
    _raise_first([_other_save(each.name, reports[0].name) or each.refusal for each in reports], save)
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
    except Exception as error:
        return _WriteReport(f"{type(error).__name__}: {error}", {}, ())
    return _WriteReport(None, files, snapshot.pieces)


def _write(save: Save, storage: Storage, name: str, *parts: Buffer) -> FileRecord:
    hasher = BlockHasher()
    storage.write(save.folder, name, hasher.blocks(*parts))
    return FileRecord(size=hasher.size, hash=hasher.hexdigest)


def _chunk(file: str, box: Box) -> Chunk:
    return Chunk(file=file, offsets=box.offsets, sizes=box.sizes)


# 3. Rank 0 commits


def _finish(save: Save, storage: Storage, reports: Sequence[_WriteReport]) -> Manifest | str:
    """Write `state.json` and the manifest and commit; return why not."""
    assert save.snapshot is not None
    try:
        # A file that rank 0 does not see at its size means separate disks, or a network file system that lags.
        files = {name: record for report in reports for name, record in report.files.items()}
        common = StateFile(tensors=_tensor_records(save.snapshot, reports), value=save.snapshot.state)
        if (problem := common.problem() or _unseen(storage, save.folder, files)) is not None:
            return problem
        files[STATE] = _write(save, storage, STATE, write_state_file(common))
        manifest = _manifest(save, len(reports), files)
        storage.sync_folder(save.folder)  # before the manifest, which must not survive a loss of power without the rest
        storage.write(save.folder, MANIFEST, [write_manifest(manifest)])
        storage.sync_folder(save.folder)
        if storage.has_rename:
            storage.rename(save.folder, str(save.name))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
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
    present = storage.files(folder)
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
    )


def _discard(save: Save, storage: Storage) -> None:
    try:
        remove_checkpoint(storage, save.folder)
    except Exception:
        return  # the next start removes it
