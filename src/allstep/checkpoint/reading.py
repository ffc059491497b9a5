"""Tensors and values read out of a checkpoint.

Contract: a `CheckpointReader` reads the files of one verified checkpoint, on one rank, without the others. Any box of
any tensor can be read, whatever pieces it was written in, so the world size of the run that saved does not matter.
DTensors of a template are filled in place; all else comes as new tensors on the CPU. Only JSON and numbers are read;
nothing is unpickled or executed. DamagedCheckpointError is raised where the files contradict each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

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
from allstep.parallel import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MOST_ROWS = 4 << 20  # bytes that are read at once of rows of which a part is wanted


@dataclass(frozen=True, slots=True)
class ShardedLike:
    """Stands in a template for a part of the state whose tensors are sharded as one that the run has.

    An optimizer has a state for a parameter only once that has had a gradient, so a run that begins has no tensors to
    fill.
    """

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class FromDocument:
    """Stands in a template for a part whose template depends on what was saved of it, which `make` is given as JSON."""

    make: Callable[[Any], Any]


class LoadTargets:
    """The DTensors of a template, by the names that their tensors have in a checkpoint whose document is this."""

    def __init__(self, template: Mapping[str, Any], document: Any = None) -> None:
        self._filled: dict[str, DTensor] = {}
        self._keys: dict[str, tuple[Any, ...]] = {}
        self._like: dict[str, torch.Tensor] = {}
        parts = document if isinstance(document, Mapping) else {}
        self._collect(
            {
                name: each.make(parts.get(name)) if isinstance(each, FromDocument) else each
                for name, each in template.items()
            },
            (),
        )

    def find(self, name: str, record: TensorRecord) -> DTensor | None:
        """What to fill with a tensor; None where it is to be read as it is."""
        if name in self._filled:
            return self._filled[name]
        # "optimizer/state/0/exp_avg" is as parameter 0 is, unless it is of another shape, as "step" is.
        like = self._like.get(name.rpartition("/")[0])
        if not is_dtensor(like) or not record.shape:
            return None
        if tuple(like.shape) != record.shape:  # such as the sums over rows that Adafactor keeps
            return like.new_empty(record.shape, dtype=find_dtype(record.dtype))  # type: ignore[return-value]
        return torch.empty_like(like, dtype=find_dtype(record.dtype))  # type: ignore[return-value]

    def tied_elsewhere(self, state: Any, names: Collection[str]) -> Iterator[tuple[Any, Any, DTensor]]:
        """Where `state` has another tensor in place of one to be filled: the holder, the key, and what to fill.

        That is so where tensors were tied in the run that saved, have one of these names there, and are apart here.
        """
        for name, target in self._filled.items():
            if name in names:
                continue
            *outer, last = self._keys[name]
            holder = state
            for key in outer:
                holder = holder.get(key) if isinstance(holder, Mapping) else None
            if isinstance(holder, MutableMapping) and isinstance(holder.get(last), torch.Tensor):
                yield holder, last, target

    def _collect(self, value: Any, keys: tuple[Any, ...]) -> None:
        name = tensor_name(map(name_part, keys))
        if is_dtensor(value):
            self._filled[name], self._keys[name] = value, keys
        elif isinstance(value, ShardedLike):
            self._like[name] = value.tensor
        elif isinstance(value, Mapping | list | tuple):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                self._collect(item, (*keys, key))


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
        value = self._read_document(STATE, template)
        if not isinstance(value, dict):
            raise DamagedCheckpointError(f"{STATE} holds a {type(value).__name__} instead of state by name")
        return value

    def read_per_rank(self) -> list[Any]:
        """What each rank that saved had for itself, in rank order."""
        return [self._read_document(value_file(rank), {}) for rank in range(self._manifest.world_size)]

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

    def _read_document(self, file: str, template: Mapping[str, Any]) -> Any:
        contents = self.state_file(file)
        targets = LoadTargets(template, contents.value)
        done: dict[str, torch.Tensor] = {}  # tied weights come once and stay one tensor

        def fetch(name: str) -> torch.Tensor:
            if name not in done:
                record = contents.tensors[name]
                target = targets.find(name, record)
                done[name] = self.read_tensor(name, record) if target is None else self._fill(name, record, target)
            return done[name]

        value = decode(contents.value, fetch)
        names = {id(tensor): name for name, tensor in done.items()}
        for holder, key, target in targets.tied_elsewhere(value, contents.tensors):
            name = names[id(holder[key])]
            holder[key] = self._fill(name, contents.tensors[name], target)
        return value

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
        # A few rows at a time: a part of each is wanted, and all of them may be more than this rank has memory for.
        row_size = (slot.end - slot.begin) // chunk.sizes[0]
        at_once = max(1, min(common.sizes[0], _MOST_ROWS // row_size))
        rows = torch.empty((at_once, *chunk.sizes[1:]), dtype=result.dtype)
        for begin in range(0, common.sizes[0], at_once):
            count = min(at_once, common.sizes[0] - begin)
            wanted = Box((common.offsets[0] + begin, *common.offsets[1:]), (count, *common.sizes[1:]))
            self._read_rows(chunk, slot, wanted, rows[:count])
            kept = rows[_slices(wanted, (wanted.offsets[0], *chunk.offsets[1:]))]
            target[begin : begin + count].copy_(kept)

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
