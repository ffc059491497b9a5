"""How a save becomes a checkpoint, or leaves no trace.

Contract: every rank calls `commit` with its snapshot, in a thread of its own, over a coordinator that nothing else
uses. The ranks meet three times.

1. Before anything is written: do all save the same step, has every rank a snapshot, of the same tensors, and has the
   disk room for all? Rank 0 has made a fresh folder. One rank's no is everyone's.
2. Each rank writes its files, hashes them on the way, synchronises them, and reports their sizes, hashes and pieces.
   One rank's failure is everyone's.
3. Rank 0 looks whether it sees all files at their sizes, writes the shared document, then the manifest, synchronises
   the folder and renames it; where there is no rename, the manifest's arrival has committed. All learn how it went.

Whenever it fails, rank 0 removes the folder and every rank raises the same CheckpointError. A rank that dies leaves the
folder to the next start. No other checkpoint is touched.

What happens to a save once its state is copied: it is committed, and what is no longer needed is removed.

Contract: a `Store` has one `Writer` and lets one save at a time through it, on every rank, in the thread of that save.
`write` raises nothing: it returns why the save failed, the same fact on every rank, and says so in the log. That an old
checkpoint cannot be removed is said and fails nothing.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allstep.checkpoint.catalog import committed, remove_checkpoint
from allstep.checkpoint.index import Chunk, Saved, TensorRecord, write_saved
from allstep.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    FileRecord,
    Manifest,
    Name,
    tensor_file,
    value_file,
    write_manifest,
)
from allstep.checkpoint.selection import Retention
from allstep.checkpoint.sharding import Piece
from allstep.checkpoint.snapshot import Snapshot, Spec
from allstep.checkpoint.storage import Buffer, Hashed, Storage
from allstep.coordination import Coordinator
from allstep.errors import CheckpointError
from allstep.version import __version__

_ROOM = 1 << 20  # for the documents and the folder itself
_LARGEST_GAP = 3  # names of tensors in a message


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be saved, the same on all ranks but for the snapshot; `refused` is why there is none."""

    name: Name
    folder: str
    snapshot: Snapshot | None
    refused: str | None
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Ready:
    name: Name
    refused: str | None
    size: int
    free: int | None
    tensors: int  # a hash of names, dtypes and shapes


@dataclass(frozen=True, slots=True)
class _Written:
    failure: str | None
    files: dict[str, FileRecord]
    pieces: tuple[Piece, ...]


def commit(order: Order, storage: Storage, coordinator: Coordinator) -> Manifest:
    """Write a checkpoint together with the other ranks and return its manifest, on every rank.

    Raises:
        CheckpointError: it was not committed; on every rank alike.
    """
    made = False
    committed = False
    try:
        refused, made = _prepare(order, storage, coordinator.rank)
        _agree_to_write(order, refused, storage, coordinator)
        written = coordinator.gather(_write_own(order, storage, coordinator.rank))
        _raise_first([report.failure for report in written], order)
        outcome: Manifest | str = "rank 0 has not committed it"
        if coordinator.rank == 0:
            outcome = _seal(order, storage, written)
        committed = isinstance(outcome, Manifest)
        outcome = coordinator.broadcast(outcome, 0)
        if isinstance(outcome, str):
            raise CheckpointError(f"step {order.name.step} was not saved: {outcome}")
        return outcome
    except (RuntimeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"step {order.name.step} was not saved: the ranks lost each other: {error}") from error
    finally:
        if made and not committed:
            _discard(order, storage)


def _prepare(order: Order, storage: Storage, rank: int) -> tuple[str | None, bool]:
    """Make the folder, on rank 0; return why this rank cannot save, and whether a folder was made."""
    if order.refused is not None or rank != 0:
        return order.refused, False
    try:
        storage.make(order.folder)
    except Exception as error:  # file systems behind fsspec have errors of their own, here and below
        return f"no folder can be made in {storage.root}: {error}", False
    return None, True


def _agree_to_write(order: Order, refused: str | None, storage: Storage, coordinator: Coordinator) -> None:
    snapshot = order.snapshot
    free: int | None = None
    if coordinator.rank == 0:  # which alone knows that what it removed of earlier saves is gone
        try:
            free = storage.free()
        except Exception as error:
            refused = refused or f"the disk's free space is unknown: {error}"
    specs = snapshot.specs if snapshot is not None else {}
    size = snapshot.staged.size if snapshot is not None else 0
    ready: list[_Ready] = coordinator.gather(_Ready(order.name, refused, size, free, _digest(specs)))
    _raise_first([_other_save(each.name, ready[0].name) or each.refused for each in ready], order)
    if len({each.tensors for each in ready}) > 1:
        raise CheckpointError(f"step {order.name.step} was not saved: {_difference(coordinator.gather(specs))}")
    need = sum(each.size for each in ready) + _ROOM
    room = ready[0].free
    if room is not None and room < need:
        raise CheckpointError(
            f"step {order.name.step} was not saved: it needs {need / 1e6:,.1f} MB and {storage.root} has "
            f"{room / 1e6:,.1f} MB left; make room, or keep fewer checkpoints"
        )


def _write_own(order: Order, storage: Storage, rank: int) -> _Written:
    snapshot = order.snapshot
    assert snapshot is not None
    files: dict[str, FileRecord] = {}
    try:
        values = Saved(tensors=_own_records(snapshot.per_rank_specs, tensor_file(rank)), value=snapshot.per_rank)
        _write(order, storage, files, tensor_file(rank), snapshot.staged.header, snapshot.staged.data)
        _write(order, storage, files, value_file(rank), write_saved(values))
    except Exception as error:
        return _Written(f"{type(error).__name__}: {error}", {}, ())
    return _Written(None, files, snapshot.pieces)


def _seal(order: Order, storage: Storage, written: Sequence[_Written]) -> Manifest | str:
    """Write the document and the manifest and commit; return why not."""
    assert order.snapshot is not None
    try:
        files = {name: record for report in written for name, record in report.files.items()}
        saved = Saved(tensors=_records(order.snapshot.specs, written), value=order.snapshot.state)
        if (problem := saved.problem() or _unseen(storage, order.folder, files)) is not None:
            return problem
        _write(order, storage, files, STATE, write_saved(saved))
        manifest = _manifest(order, len(written), files)
        storage.settle(order.folder)  # before the manifest: it is the last to arrive
        storage.write(order.folder, MANIFEST, [write_manifest(manifest)])
        storage.settle(order.folder)
        if storage.has_rename:
            storage.rename(order.folder, str(order.name))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return manifest


def _write(order: Order, storage: Storage, files: dict[str, FileRecord], name: str, *parts: Buffer) -> None:
    hashed = Hashed()
    storage.write(order.folder, name, hashed.blocks(*parts))
    files[name] = FileRecord(size=hashed.size, hash=hashed.hexdigest)


def _manifest(order: Order, world_size: int, files: Mapping[str, FileRecord]) -> Manifest:
    return Manifest(
        format=FORMAT,
        order=order.name.order,
        step=order.name.step,
        world_size=world_size,
        created=time.time(),
        versions={"allstep": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        metrics=dict(order.metrics),
        facts=dict(order.facts),
        files=dict(files),
    )


def _records(specs: Mapping[str, Spec], written: Sequence[_Written]) -> dict[str, TensorRecord]:
    chunks: dict[str, list[Chunk]] = {name: [] for name in specs}
    for rank, report in enumerate(written):
        for piece in report.pieces:
            chunks[piece.name].append(Chunk(file=tensor_file(rank), offsets=piece.offsets, sizes=piece.sizes))
    return {
        name: TensorRecord(dtype=dtype, shape=shape, chunks=tuple(chunks[name]))
        for name, (dtype, shape) in specs.items()
    }


def _own_records(specs: Mapping[str, Spec], file: str) -> dict[str, TensorRecord]:
    return {
        name: TensorRecord(dtype=dtype, shape=shape, chunks=(Chunk(file=file, offsets=(0,) * len(shape), sizes=shape),))
        for name, (dtype, shape) in specs.items()
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


def _other_save(name: Name, of_first: Name) -> str | None:
    if name == of_first:
        return None
    return f"it saves {name}, and rank 0 {of_first}; call save on every rank, at the same point"


def _discard(order: Order, storage: Storage) -> None:
    try:
        remove_checkpoint(storage, order.folder)
    except Exception:
        return  # the next start sweeps it away


def _digest(specs: Mapping[str, Spec]) -> int:
    hashed = Hashed()
    for _ in hashed.blocks(repr(sorted(specs.items())).encode()):
        pass
    return int(hashed.hexdigest, 16)


def _difference(all_specs: Sequence[Mapping[str, Spec]]) -> str:
    first = all_specs[0].items()
    for rank, specs in enumerate(all_specs):
        names = sorted({name for name, _ in first ^ specs.items()})
        if names:
            shown = ", ".join(names[:_LARGEST_GAP]) + (", ..." if len(names) > _LARGEST_GAP else "")
            return f"rank {rank} has other tensors to save than rank 0 ({shown}); give the same state on all ranks"
    return "ranks have different tensors to save"


def _raise_first(failures: Sequence[str | None], order: Order) -> None:
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise CheckpointError(f"step {order.name.step} was not saved: rank {rank}: {failure}")


log = logging.getLogger("allstep.checkpoint")


class Writer:
    """Commits saves to `storage` with the other ranks, which it meets through `coordinator`."""

    def __init__(self, storage: Storage, coordinator: Coordinator, retention: Retention) -> None:
        self._storage = storage
        self._coordinator = coordinator
        self._retention = retention
        self._lacked_metric = False

    def write(self, order: Order) -> CheckpointError | None:
        """Write this rank's part of a save and commit it with the others; returns why that failed."""
        error: CheckpointError | None = None
        try:
            commit(order, self._storage, self._coordinator)
        except CheckpointError as failure:
            error = failure
        except Exception as failure:
            error = CheckpointError(f"step {order.name.step} was not saved: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
        if error is not None:
            log.error("%s (rank %d)", error, self._coordinator.rank)
        elif self._coordinator.rank == 0:
            self._retire()
        return error

    def check_metric(self, metrics: Mapping[str, float]) -> None:
        """Warn once when the metric that the best are kept by is not among those that are saved."""
        best = self._retention.keep_best
        if best is None or best[1] in metrics or self._lacked_metric or self._coordinator.rank:
            return
        self._lacked_metric = True
        log.warning(
            "metric %r is not among those that are saved (%s): checkpoints without it are never among the best",
            best[1],
            ", ".join(sorted(metrics)) or "none",
        )

    def _retire(self) -> None:
        try:
            for name in self._retention.expendable(committed(self._storage)):
                remove_checkpoint(self._storage, str(name))
        except Exception as error:
            log.warning("old checkpoints in %s could not be removed: %s", self._storage.root, error)
