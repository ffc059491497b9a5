"""Tensors and values out of a checkpoint.

Contract: a `Reader` reads the files of one checkpoint that was chosen, on one rank, without the others. Any box of any
tensor can be read, whatever pieces it was written in, so the world size of the run that saved does not matter. Only
JSON and numbers are read; nothing is unpickled or executed. What can go wrong: DamagedCheckpointError where the files
contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch.distributed.tensor import DTensor

from allstep.checkpoint.encoding import decode, name_part, tensor_name
from allstep.checkpoint.index import Chunk, Saved, TensorRecord, read_saved
from allstep.checkpoint.manifest import STATE, Manifest, value_file
from allstep.checkpoint.safetensors_file import Slot, find_dtype, read_header, stored_as, stored_shape, to_stored
from allstep.checkpoint.sharding import Region, local_regions, overlap, piece_key
from allstep.checkpoint.storage import Storage
from allstep.errors import CheckpointError, DamagedCheckpointError


@dataclass(frozen=True, slots=True)
class ShardedLike:
    """Stands in a template for a part of the state whose tensors are sharded as one that the run has.

    What an optimizer keeps of a parameter is there only once the parameter has had a gradient, so a run that begins
    has no tensors to fill.
    """

    tensor: torch.Tensor


class Targets:
    """The DTensors that a template has for tensors of a checkpoint."""

    def __init__(self, template: Mapping[str, Any]) -> None:
        self._filled: dict[str, DTensor] = {}
        self._like: dict[str, torch.Tensor] = {}
        self._collect(template, ())

    def find(self, name: str, record: TensorRecord) -> DTensor | None:
        """What to fill with a tensor; None where it is to be read as it is."""
        if name in self._filled:
            return self._filled[name]
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


class Reader:
    """Reads one checkpoint; a context manager, which closes the files."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest
        self._open = ExitStack()
        self._files: dict[str, tuple[BinaryIO, int, dict[str, Slot]]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def read_state(self, template: Mapping[str, Any]) -> dict[str, Any]:
        """The whole state by name; DTensors of `template` are filled where they are and take their places in it."""
        value = self._read_document(STATE, Targets(template))
        if not isinstance(value, dict):
            raise DamagedCheckpointError(f"{STATE} holds a {type(value).__name__} instead of state by name")
        return value

    def read_per_rank(self) -> list[Any]:
        """What each rank of the run that saved had for itself, in rank order."""
        return [self._read_document(value_file(rank), Targets({})) for rank in range(self._manifest.world_size)]

    def read_tensor(self, name: str, record: TensorRecord) -> torch.Tensor:
        """A whole tensor, on the CPU."""
        return self._read_region(name, record, ((0,) * len(record.shape), record.shape))

    def saved(self, file: str) -> Saved:
        """The document and the index in one of the checkpoint's JSON files."""
        if file not in self._manifest.files:
            raise DamagedCheckpointError(f"the manifest lists no {file}")
        with self._storage.open(self._folder, file) as opened:
            return read_saved(opened.read())

    def _read_document(self, file: str, targets: Targets) -> Any:
        saved = self.saved(file)
        done: dict[str, torch.Tensor] = {}

        def fetch(name: str) -> torch.Tensor:
            if name not in done:
                record = saved.tensors[name]
                target = targets.find(name, record)
                done[name] = self.read_tensor(name, record) if target is None else self._fill(name, record, target)
            return done[name]

        return decode(saved.value, fetch)

    def _fill(self, name: str, record: TensorRecord, target: DTensor) -> DTensor:
        if tuple(target.shape) != record.shape:
            raise CheckpointError(
                f"{name} has shape {list(record.shape)} in {self._folder} and {list(target.shape)} in this run; "
                "load it into a model of the same architecture"
            )
        local = target.to_local().detach()
        for region in local_regions(target):
            if math.prod(region[1]):
                local.copy_(self._read_region(name, record, region))
        return target

    def _read_region(self, name: str, record: TensorRecord, region: Region) -> torch.Tensor:
        dtype = find_dtype(record.dtype)
        needed = [(chunk, common) for chunk in record.chunks if (common := overlap(_box(chunk), region)) is not None]
        slots = [self._slot(name, record, chunk) for chunk, _ in needed]  # all checked before memory is taken
        result = torch.empty(region[1], dtype=dtype)
        for (chunk, common), slot in zip(needed, slots, strict=True):
            self._read_common(chunk, slot, common, region, result)
        return result

    def _read_common(self, chunk: Chunk, slot: Slot, common: Region, region: Region, result: torch.Tensor) -> None:
        """Copy what a chunk and a region have in common to its place in `result`, which is the region."""
        target = result[_within(common, region[0])]
        if chunk.sizes[1:] == common[1][1:] == region[1][1:]:
            self._read_rows(chunk, slot, common, target)  # whole rows: read to where they belong
            return
        rows = torch.empty((common[1][0], *chunk.sizes[1:]), dtype=result.dtype)
        self._read_rows(chunk, slot, common, rows)
        target.copy_(rows[_within(common, (common[0][0], *chunk.offsets[1:]))])

    def _read_rows(self, chunk: Chunk, slot: Slot, common: Region, target: torch.Tensor) -> None:
        stored = to_stored(target).reshape(-1).view(torch.uint8)
        first = common[0][0] - chunk.offsets[0] if chunk.sizes else 0
        row = (slot.end - slot.begin) // chunk.sizes[0] if chunk.sizes else 0
        file, start, _ = self._files[chunk.file]
        file.seek(start + slot.begin + first * row)
        _read_into(file, stored.numpy().data)

    def _slot(self, name: str, record: TensorRecord, chunk: Chunk) -> Slot:
        dtype = find_dtype(record.dtype)
        slot = self._header(chunk.file).get(piece_key(chunk.piece(name), record.shape))
        if slot is None or slot.dtype is not stored_as(dtype) or slot.shape != stored_shape(dtype, chunk.sizes):
            raise DamagedCheckpointError(f"{chunk.file} does not hold the piece of tensor {name} that it should")
        return slot

    def _header(self, file: str) -> dict[str, Slot]:
        if file not in self._files:
            if file not in self._manifest.files:
                raise DamagedCheckpointError(f"the manifest lists no {file}")
            opened = self._open.enter_context(self._storage.open(self._folder, file))
            self._files[file] = (opened, *read_header(opened, self._manifest.files[file].size))
        return self._files[file][2]


def _box(chunk: Chunk) -> Region:
    return chunk.offsets, chunk.sizes


def _within(common: Region, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(at - start, at - start + size) for at, size, start in zip(common[0], common[1], origin, strict=True)
    )


def _read_into(file: BinaryIO, view: memoryview) -> None:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise DamagedCheckpointError(f"a file ends {view.nbytes} bytes before it should")
        view = view[count:]
