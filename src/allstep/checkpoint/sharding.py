"""Who writes which piece of which tensor.

Contract: a replicated tensor is the same on all ranks, and is written once: every rank computes the same division from
names, dtypes and shapes, without a word to the others. Large ones are cut along their first dimension, so that ranks
write about equally much. Of a sharded tensor (DTensor) each rank writes its own shard, and of shards that several ranks
hold one rank does. Together the pieces cover each tensor exactly; whether they do is checked when a save is committed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.distributed.tensor import DTensor, Replicate

_LARGE = 4 << 20

Region = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: where it begins in each dimension and how long it is there."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.sizes)


def piece_key(piece: Piece, shape: Sequence[int]) -> str:
    """What a file calls a piece of a tensor of this shape: the tensor's name where it is whole."""
    if piece.sizes == tuple(shape):
        return piece.name
    return f"{piece.name}@{','.join(map(str, piece.offsets))}"


def own_pieces(
    tensors: Mapping[str, torch.Tensor], rank: int, world_size: int, of_first: Container[str] = ()
) -> list[tuple[Piece, torch.Tensor]]:
    """The pieces that a rank writes, each with its values; rank 0 writes the tensors in `of_first`."""
    replicated = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    shared = {name: tensor for name, tensor in replicated.items() if name not in of_first}
    shapes = [(name, tensor.dtype.itemsize, tuple(tensor.shape)) for name, tensor in shared.items()]
    pieces = [(piece, _values(shared[piece.name], piece)) for piece in divide(shapes, world_size)[rank]]
    if rank == 0:
        pieces.extend((_whole(name, tensor.shape), tensor) for name, tensor in replicated.items() if name in of_first)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and _writes(name, tensor):
            pieces.extend((piece, tensor.to_local().detach()) for piece in _shards(name, tensor) if piece.numel)
    return pieces


def local_regions(tensor: torch.Tensor) -> list[Region]:
    """The boxes of a tensor that this rank holds: of a DTensor its shard, of any other the whole."""
    if isinstance(tensor, DTensor):
        return [(piece.offsets, piece.sizes) for piece in _shards("", tensor)]
    return [((0,) * tensor.dim(), tuple(tensor.shape))]


def divide(tensors: Sequence[tuple[str, int, tuple[int, ...]]], world_size: int) -> list[list[Piece]]:
    """Divide replicated tensors, given as (name, bytes of an element, shape), among ranks.

    The largest pieces are given out first, each to the rank that has least.
    """
    pieces = [
        (piece, piece.numel * itemsize)
        for name, itemsize, shape in tensors
        for piece in _cut(name, itemsize, shape, world_size)
    ]
    pieces.sort(key=lambda entry: (-entry[1], entry[0].name, entry[0].offsets))
    shares: list[list[Piece]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for piece, size in pieces:
        least = loads.index(min(loads))
        shares[least].append(piece)
        loads[least] += size
    return shares


def covers(shape: Sequence[int], pieces: Sequence[Piece]) -> bool:
    """Whether pieces lie within a tensor of this shape, do not overlap, and leave nothing out."""
    if any(len(piece.sizes) != len(shape) or len(piece.offsets) != len(shape) for piece in pieces):
        return False
    for piece in pieces:
        if any(
            at < 0 or length < 0 or at + length > whole
            for at, length, whole in zip(piece.offsets, piece.sizes, shape, strict=True)
        ):
            return False
    if sum(piece.numel for piece in pieces) != math.prod(shape):
        return False
    ordered = sorted((piece for piece in pieces if piece.numel), key=lambda piece: piece.offsets)
    return not any(
        overlap((first.offsets, first.sizes), (second.offsets, second.sizes)) is not None
        for at, first in enumerate(ordered)
        for second in _until_beyond(first, ordered[at + 1 :])
    )


def overlap(first: Region, second: Region) -> Region | None:
    """The box that two boxes have in common; None where they have none."""
    begin = tuple(max(a, b) for a, b in zip(first[0], second[0], strict=True))
    ends = zip(*first, *second, strict=True)
    sizes = tuple(min(a + m, b + n) - at for (a, m, b, n), at in zip(ends, begin, strict=True))
    return (begin, sizes) if all(size > 0 for size in sizes) else None


def _until_beyond(first: Piece, later: Sequence[Piece]) -> list[Piece]:
    """Those of `later`, which is in order, that begin before `first` ends in the first dimension."""
    if not first.sizes:
        return list(later)
    end = first.offsets[0] + first.sizes[0]
    found = []
    for piece in later:
        if piece.offsets[0] >= end:
            break
        found.append(piece)
    return found


def _cut(name: str, itemsize: int, shape: tuple[int, ...], world_size: int) -> list[Piece]:
    whole = _whole(name, shape)
    if world_size == 1 or not shape or whole.numel * itemsize < _LARGE or shape[0] < 2:
        return [whole]
    count = min(world_size, shape[0])
    edges = [shape[0] * at // count for at in range(count + 1)]
    rest = shape[1:]
    return [Piece(name, (begin, *(0,) * len(rest)), (end - begin, *rest)) for begin, end in pairwise(edges)]


def _whole(name: str, shape: Sequence[int]) -> Piece:
    return Piece(name, (0,) * len(shape), tuple(shape))


def _values(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    if piece.sizes == tuple(tensor.shape):
        return tensor
    return tensor.narrow(0, piece.offsets[0], piece.sizes[0])


def _shards(name: str, tensor: DTensor) -> list[Piece]:
    # The protocol by which DTensor tells torch's own checkpoints where its shard lies.
    chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return [Piece(name, tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]


def _writes(name: str, tensor: DTensor) -> bool:
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return False
    choice = zlib.crc32(name.encode())
    return all(
        place[dim] == choice % tensor.device_mesh.size(dim)
        for dim, placement in enumerate(tensor.placements)
        if isinstance(placement, Replicate)
    )
