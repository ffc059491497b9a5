"""What one rank brings to a save, taken while training waits.

Contract: `take_snapshot` is called by every rank with the same state, and returns when nothing in the result refers to
live tensors or containers any more. Everything after it (writing JSON, hashing, files) happens in the background.

The copy of the state that is written while training goes on.

Contract: `Stager.stage` returns when the values are copied; only that time is training blocked. The memory is kept for
the next save, which then neither allocates nor touches new pages, and the layout too where names and shapes are the
same. What it gave is overwritten by the next call, so there is one save at a time. Tensors on an accelerator go through
pinned memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from allstep.checkpoint.encoding import encode
from allstep.checkpoint.safetensors_file import Layout, dtype_name, lay_out, stored_as, stored_shape, to_stored
from allstep.checkpoint.sharding import Piece, own_pieces, piece_key
from allstep.errors import UnkeepableError

PER_RANK = "~rank"

Spec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's part of a save.

    Attributes:
        staged: the tensors that this rank writes, in the bytes of their file.
        state: the document of what all ranks have in common.
        specs: dtype and shape of every tensor that it names, the same on all ranks.
        pieces: those of them that this rank writes.
        per_rank: the document of what this rank alone has.
        per_rank_specs: dtype and shape of the tensors that it names, all of which this rank writes.
    """

    staged: Staged
    state: dict[str, Any]
    specs: dict[str, Spec]
    pieces: tuple[Piece, ...]
    per_rank: Any
    per_rank_specs: dict[str, Spec]


def take_snapshot(state: Mapping[str, Any], per_rank: Any, stager: Stager, rank: int, world_size: int) -> Snapshot:
    """Copy what this rank has to write.

    Args:
        state: nested values by name; tensors that are no DTensors are the same on all ranks.
        per_rank: a nested value that this rank alone has.
        stager: keeps the memory from one save to the next.
        rank, world_size: this rank among those that save.

    Raises:
        UnkeepableError: something in it cannot be kept.
    """
    document: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    of_first: set[str] = set()
    for name, value in state.items():
        if not isinstance(name, str) or not name or "/" in name or name[0] in "~$":
            raise UnkeepableError(f'{name!r} cannot name a part of the state; use a string without "/" in it')
        encoded = encode(value, name)
        document[name] = encoded.document
        tensors.update(encoded.tensors)
        of_first |= encoded.of_first
    own = encode(per_rank, PER_RANK)
    for name, tensor in own.tensors.items():
        if isinstance(tensor, DTensor):
            raise UnkeepableError(
                f"{name} is sharded over ranks, and was given as what this rank alone has; give it as common state"
            )
    pieces = own_pieces(tensors, rank, world_size, of_first)
    staged = stager.stage(
        [
            *((piece_key(piece, tensors[piece.name].shape), values) for piece, values in pieces),
            *((name, values) for name, values in own.tensors.items()),
        ]
    )
    return Snapshot(
        staged, document, _specs(tensors), tuple(piece for piece, _ in pieces), own.document, _specs(own.tensors)
    )


def _specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


_Key = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Staged:
    """A file's header and its data, ready to be written."""

    header: bytes
    data: memoryview

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data.nbytes


class Stager:
    """Copies tensors to where they wait to be written."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._keys: tuple[_Key, ...] | None = None
        self._layout = lay_out([], {})
        self._places: dict[str, torch.Tensor] = {}

    def stage(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Staged:
        """Copy tensors, each with the key that the file has for it."""
        keys = tuple((key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors)
        if keys != self._keys:
            self._prepare(keys, pinned=any(tensor.is_cuda for _, tensor in tensors))
        devices = set()
        for key, tensor in tensors:
            self._places[key].copy_(to_stored(tensor), non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        data = self._buffer[: self._layout.data_size].numpy()
        return Staged(self._layout.header, data.data)

    def _prepare(self, keys: tuple[_Key, ...], *, pinned: bool) -> None:
        self._keys, self._places = None, {}
        self._layout = lay_out(
            ((key, stored_as(dtype), stored_shape(dtype, shape)) for key, dtype, shape in keys), {"format": "pt"}
        )
        size = self._layout.data_size
        if self._buffer.numel() < size or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # let go of the old memory first
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._places = _views(self._buffer, self._layout)
        self._keys = keys


def _views(buffer: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    return {slot.key: buffer[slot.begin : slot.end].view(slot.dtype).view(slot.shape) for slot in layout.slots}
