"""Tensors and values read out of a checkpoint.

Contract: a `CheckpointReader` reads the files of one verified checkpoint, on one rank, without the others. Any box of
any tensor can be read, whatever pieces it was written in, so the world size of the run that saved does not matter.
DTensors of a template are filled in place; all else comes as new tensors on the CPU. Only JSON and numbers are read;
nothing is unpickled or executed. DamagedCheckpointError is raised where the files contradict each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch.distributed.tensor import DTensor

from allstep.checkpoint.encoding import (
    Chunk,
    StateFile,
    TensorRecord,
    decode,
    name_part,
    read_state_file,
    tensor_name,
)
from allstep.checkpoint.manifest import STATE, Manifest, value_file
from allstep.checkpoint.safetensors_file import TensorSlot, find_dtype, read_header, stored_as, stored_shape, to_stored
from allstep.checkpoint.sharding import Box, Piece, local_boxes, whole_box
from allstep.checkpoint.storage import Storage
from allstep.errors import CheckpointError, DamagedCheckpointError


@dataclass(frozen=True, slots=True)
class ShardedLike:
    """Stands in a template for a part of the state whose tensors are sharded as one that the run has.

    An optimizer has a state for a parameter only once that has had a gradient, so a run that begins has no tensors to
    fill.
    """

    tensor: torch.Tensor


class LoadTargets:
    """The DTensors of a template, by the names that their tensors have in a checkpoint."""

    def __init__(self, template: Mapping[str, Any]) -> None:
        self._filled: dict[str, DTensor] = {}
        self._like: dict[str, torch.Tensor] = {}
        self._collect(template, ())

    def find(self, name: str, record: TensorRecord) -> DTensor | None:
        """What to fill with a tensor; None where it is to be read as it is."""
        if name in self._filled:
            return self._filled[name]
        # "optimizer/state/0/exp_avg" is as parameter 0 is, unless it is of another shape, as "step" is.
        like = self._like.get(name.rpartition("/")[0])
        if not isinstance(like, DTensor) or tuple(like.shape) != record.shape:
            return None
        return torch.empty_like(like, dtype=find_dtype(record.dtype))  # type: ignore[return-value]

    def _collect(self, value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, DTensor):
            self._filled[tensor_name(path)] = value
        elif isinstance(value, ShardedLike):
            self._like[tensor_name(path)] = value.tensor
        elif isinstance(value, Mapping | list | tuple):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                self._collect(item, (*path, name_part(key)))


class CheckpointReader:
    """Reads one checkpoint; a context manager, which closes the files."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest
        self._open_files = ExitStack()
        # For each file of tensors: open, where its data begins, and the slot of each key.
        self._files: dict[str, tuple[BinaryIO, int, dict[str, TensorSlot]]] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open_files.close()

    def read_state(self, template: Mapping[str, Any]) -> dict[str, Any]:
        """The whole state by name; DTensors of `template` are filled where they are and take their places in it."""
        value = self._read_document(STATE, LoadTargets(template))
        if not isinstance(value, dict):
            raise DamagedCheckpointError(f"{STATE} holds a {type(value).__name__} instead of state by name")
        return value

    def read_per_rank(self) -> list[Any]:
        """What each rank that saved had for itself, in rank order."""
        return [self._read_document(value_file(rank), LoadTargets({})) for rank in range(self._manifest.world_size)]

    def read_tensor(self, name: str, record: TensorRecord) -> torch.Tensor:
        """A whole tensor, on the CPU, in memory as it was."""
        read = self._read_box(name, record, whole_box(record.shape))
        if record.strides is None:
            return read
        return torch.empty_strided(record.shape, record.strides, dtype=read.dtype).copy_(read)

    def state_file(self, file: str) -> StateFile:
        """The contents of one of the checkpoint's JSON files."""
        if file not in self._manifest.files:
            raise DamagedCheckpointError(f"the manifest lists no {file}")
        with self._storage.open(self._folder, file) as opened:
            return read_state_file(opened)

    def _read_document(self, file: str, targets: LoadTargets) -> Any:
        contents = self.state_file(file)
        done: dict[str, torch.Tensor] = {}  # tied weights come once and stay one tensor

        def fetch(name: str) -> torch.Tensor:
            if name not in done:
                record = contents.tensors[name]
                target = targets.find(name, record)
                done[name] = self.read_tensor(name, record) if target is None else self._fill(name, record, target)
            return done[name]

        return decode(contents.value, fetch)

    def _fill(self, name: str, record: TensorRecord, target: DTensor) -> DTensor:
        if tuple(target.shape) != record.shape:
            raise CheckpointError(
                f"{name} has shape {list(record.shape)} in {self._folder} and {list(target.shape)} in this run; "
                "load it into a model of the same architecture"
            )
        local = target.to_local().detach()
        for box in local_boxes(target):
            if box.numel:
                local.copy_(self._read_box(name, record, box))
        return target

    def _read_box(self, name: str, record: TensorRecord, box: Box) -> torch.Tensor:
        """A box of a tensor, put together from the chunks that overlap it."""
        needed = [(chunk, common) for chunk in record.chunks if (common := chunk.box.overlap(box)) is not None]
        # All are checked before memory is taken, for a hostile shape may ask for any amount.
        slots = [self._slot(name, record, chunk) for chunk, _ in needed]
        result = torch.empty(box.sizes, dtype=find_dtype(record.dtype))
        for (chunk, common), slot in zip(needed, slots, strict=True):
            self._read_common(chunk, slot, common, box, result)
        return result

    def _read_common(self, chunk: Chunk, slot: TensorSlot, common: Box, box: Box, result: torch.Tensor) -> None:
        """Copy what a chunk and a box have in common to its place in `result`, which is the box."""
        target = result[_slices(common, box.offsets)]
        if chunk.sizes[1:] == common.sizes[1:] == box.sizes[1:]:
            self._read_rows(chunk, slot, common, target)  # whole rows, read straight to where they belong
            return
        rows = torch.empty((common.sizes[0], *chunk.sizes[1:]), dtype=result.dtype)
        self._read_rows(chunk, slot, common, rows)
        target.copy_(rows[_slices(common, (common.offsets[0], *chunk.offsets[1:]))])

    def _read_rows(self, chunk: Chunk, slot: TensorSlot, common: Box, target: torch.Tensor) -> None:
        """Read the rows of a chunk that `common` spans, as bytes, into `target`, which is contiguous."""
        stored = to_stored(target).reshape(-1).view(torch.uint8)
        first = common.offsets[0] - chunk.offsets[0] if chunk.sizes else 0
        row_size = (slot.end - slot.begin) // chunk.sizes[0] if chunk.sizes else 0
        file, start, _ = self._files[chunk.file]
        file.seek(start + slot.begin + first * row_size)
        _read_into(file, stored.numpy().data)

    def _slot(self, name: str, record: TensorRecord, chunk: Chunk) -> TensorSlot:
        dtype = find_dtype(record.dtype)
        slot = self._header(chunk.file).get(Piece(name, chunk.box).key(record.shape))
        if slot is None or slot.dtype is not stored_as(dtype) or slot.shape != stored_shape(dtype, chunk.sizes):
            raise DamagedCheckpointError(f"{chunk.file} does not hold the piece of tensor {name} that it should")
        return slot

    def _header(self, file: str) -> dict[str, TensorSlot]:
        if file not in self._files:
            if file not in self._manifest.files:
                raise DamagedCheckpointError(f"the manifest lists no {file}")
            opened = self._open_files.enter_context(self._storage.open(self._folder, file))
            self._files[file] = (opened, *read_header(opened, self._manifest.files[file].size))
        return self._files[file][2]


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a box lies in a tensor whose first element is at `origin`."""
    return tuple(
        slice(at - start, at - start + size) for at, size, start in zip(box.offsets, box.sizes, origin, strict=True)
    )


def _read_into(file: BinaryIO, view: memoryview) -> None:
    while view:  # an object store may give a part at a time
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise DamagedCheckpointError(f"a file ends {view.nbytes} bytes before it should")
        view = view[count:]
