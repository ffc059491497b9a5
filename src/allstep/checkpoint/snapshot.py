"""What one rank brings to a save: a copy of its part of the state, taken while training waits.

Contract: every rank calls `take_snapshot` with the same state. It returns when nothing in the result refers to live
tensors or containers any more. Everything after it (writing JSON, hashing, files) happens in the background.

The tensors are copied into a `SnapshotBuffer`, in the bytes of the file that will hold them. The buffer keeps its
memory for the next save, which then neither allocates nor touches new pages, and its layout too where names and shapes
are the same. It has the size of the file, and is given back where the next file takes less than half of it. The next
snapshot overwrites the one before, so there is one save at a time. Copies from CUDA run into it without the host
waiting for each, where the memory can be pinned (`HostMemory`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allstep.checkpoint.encoding import encode, kept_strides
from allstep.checkpoint.safetensors_file import NOTES, dtype_name, lay_out, stored_as, stored_shape, to_stored
from allstep.checkpoint.sharding import Piece, own_pieces
from allstep.cuda import HostMemory, wait_for_copies
from allstep.errors import UnsupportedStateError
from allstep.parallel import is_dtensor
from allstep.world.xla_private import to_host

_KEPT = 64 << 20  # bytes that are kept for a larger file, whatever the present one takes
PER_RANK = "~rank"  # no part of the common state can have a name that begins with "~"

TensorSpec = tuple[str, tuple[int, ...]]
"""A tensor's dtype by name, and its shape."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's part of a save.

    Attributes:
        file: the tensors that this rank writes, as the bytes of their file.
        state: the JSON document of what all ranks have in common.
        specs: dtype and shape of every tensor that it names, the same on all ranks.
        pieces: those of them that this rank writes.
        per_rank: the JSON document of what this rank has for itself.
        per_rank_specs: dtype and shape of the tensors that it names, all of which this rank writes.
        strides: of those tensors of either kind that are not contiguous; see `TensorRecord`.
    """

    file: BufferedFile
    state: dict[str, Any]
    specs: dict[str, TensorSpec]
    pieces: tuple[Piece, ...]
    per_rank: Any
    per_rank_specs: dict[str, TensorSpec]
    strides: dict[str, tuple[int, ...]]


def take_snapshot(
    state: Mapping[str, Any], per_rank: Any, buffer: SnapshotBuffer, rank: int, world_size: int
) -> Snapshot:
    """Copy what this rank has to write.

    Args:
        state: nested values by name; tensors that are no DTensors are the same on all ranks.
        per_rank: a nested value that this rank has for itself.
        buffer: where tensors are copied to; its memory is kept from one save to the next.
        rank, world_size: this rank among those that save.

    Raises:
        UnsupportedStateError: something in it cannot be saved.
    """
    document: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    from_rank_zero: set[str] = set()
    for name, value in state.items():
        if not isinstance(name, str) or not name or "/" in name or name[0] in "~$":
            raise UnsupportedStateError(f'{name!r} cannot name a part of the state; use a string without "/" in it')
        if name == NOTES:
            raise UnsupportedStateError(f"{name!r} cannot name a part of the state: files keep their notes under it")
        encoded = encode(value, name)
        document[name] = encoded.document
        tensors.update(encoded.tensors)
        from_rank_zero |= encoded.from_rank_zero
    own = encode(per_rank, PER_RANK)
    for name, tensor in own.tensors.items():
        if is_dtensor(tensor):
            raise UnsupportedStateError(
                f"{name} is sharded over ranks, and was given as what this rank alone has; give it as common state"
            )
    pieces = own_pieces(tensors, rank, world_size, from_rank_zero)
    file = buffer.copy(
        [
            *((piece.key(tensors[piece.name].shape), values) for piece, values in pieces),
            *((name, values) for name, values in own.tensors.items()),
        ]
    )
    strides = {
        name: found for name, tensor in (tensors | own.tensors).items() if (found := kept_strides(tensor)) is not None
    }
    written = tuple(piece for piece, _ in pieces)
    return Snapshot(file, document, _specs(tensors), written, own.document, _specs(own.tensors), strides)


def _specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class BufferedFile:
    """A file in memory, ready to be written: its header, and its data, which the next snapshot overwrites."""

    header: bytes
    data: memoryview

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data.nbytes


class SnapshotBuffer:
    """Memory for the tensors of a safetensors file, kept from one save to the next."""

    def __init__(self) -> None:
        self._memory = HostMemory(0)
        self._was_asked_to_pin = False
        self._described: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...] | None = None
        self._layout = lay_out([], {})
        self._views: dict[str, torch.Tensor] = {}

    @property
    def reserved(self) -> int:
        """Bytes of memory that are kept."""
        return self._memory.bytes.numel()

    def copy(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> BufferedFile:
        """Copy tensors, each under the key that the file has for it; returns when all are copied."""
        described = tuple((key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors)
        if described != self._described:
            self._prepare(described, pinned=any(tensor.is_cuda for _, tensor in tensors))
        devices = set()
        for key, tensor in zip((key for key, _ in tensors), to_host([tensor for _, tensor in tensors]), strict=True):
            # The copies from a device are queued together and waited for once, behind the last one.
            self._views[key].copy_(to_stored(tensor), non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            wait_for_copies(device)
        data = self._memory.bytes[: self._layout.data_size].numpy()
        return BufferedFile(self._layout.header, data.data)

    def _prepare(self, described: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...], *, pinned: bool) -> None:
        # Unset first: where memory runs out below, the next save must not take the old layout for its own.
        self._described, self._views = None, {}
        self._layout = lay_out(
            [(key, stored_as(dtype), stored_shape(dtype, shape)) for key, dtype, shape in described], {"format": "pt"}
        )
        size = self._layout.data_size
        if not size <= self._memory.bytes.numel() <= max(2 * size, _KEPT) or (pinned and not self._was_asked_to_pin):
            self._memory = HostMemory(0)  # the old memory is freed before the new is taken
            self._memory, self._was_asked_to_pin = HostMemory(size, pinned=pinned), pinned
        self._views = {
            slot.key: self._memory.bytes[slot.begin : slot.end].view(slot.dtype).view(slot.shape)
            for slot in self._layout.slots
        }
        self._described = described
