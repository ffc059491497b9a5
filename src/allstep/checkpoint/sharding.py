"""Which rank writes which piece of which tensor, and the arithmetic of boxes behind it.

Contract: a replicated tensor is the same on all ranks and is written once. Every rank computes the same assignment from
names, dtypes and shapes, without communication. Large tensors are cut along their first dimension, so that ranks write
about equally much. Of a sharded tensor (DTensor) each rank writes its own shard; a shard that several ranks hold is
written by one of them. Together the pieces cover each tensor exactly. A commit checks that with `covers`.

A box is a part of a tensor: where it begins in each dimension and how long it is there. Offsets of an empty box mean
nothing.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from allstep.parallel import is_dtensor, shard_boxes
from allstep.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MOST_CUT_DIMENSIONS = 8  # far more than a mesh of devices cuts a tensor along; each doubles the corners of a box
_SMALLEST_CUT = 4 << 20  # bytes; a smaller tensor is cheaper to write whole than to read from several files


class Box(NamedTuple):
    """A part of a tensor; both tuples have one number for each dimension, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """The box that two boxes have in common; None where they have none."""
        begin = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self.ends, other.ends)
        sizes = tuple(end - at for end, at in zip(ends, begin, strict=True))
        return Box(begin, sizes) if all(size > 0 for size in sizes) else None

    @property
    def ends(self) -> tuple[int, ...]:
        """The first position behind it in each dimension."""
        return tuple(at + size for at, size in zip(self.offsets, self.sizes, strict=True))


def whole_box(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a named tensor."""

    name: str
    box: Box

    def key(self, shape: Sequence[int]) -> str:
        """What a file calls it, given the shape of its tensor: the tensor's name alone where the piece is all of it."""
        if self.box.sizes == tuple(shape):
            return self.name
        return f"{self.name}@{','.join(map(str, self.box.offsets))}"


def own_pieces(
    tensors: Mapping[str, torch.Tensor], rank: int, world_size: int, from_rank_zero: Container[str] = ()
) -> list[tuple[Piece, torch.Tensor]]:
    """The pieces that a rank writes, each with its values.

    Args:
        tensors: by name; those that are no DTensors are the same on all ranks, or are in `from_rank_zero`.
        rank, world_size: this rank among those that save.
        from_rank_zero: names of tensors that differ by rank, of which rank 0 writes its own.
    """
    replicated = {name: tensor for name, tensor in tensors.items() if not is_dtensor(tensor)}
    shared = {name: tensor for name, tensor in replicated.items() if name not in from_rank_zero}
    shapes = [(name, tensor.dtype.itemsize, tuple(tensor.shape)) for name, tensor in shared.items()]
    pieces = [(piece, _values(shared[piece.name], piece)) for piece in assign(shapes, world_size)[rank]]
    if rank == 0:  # buffers, mostly; they are small, and which rank writes them is not free to choose
        pieces.extend(
            (Piece(name, whole_box(tensor.shape)), tensor)
            for name, tensor in replicated.items()
            if name in from_rank_zero
        )
    for name, tensor in tensors.items():
        if is_dtensor(tensor) and _writes_its_shard(name, tensor):
            shards = [Piece(name, box) for box in local_boxes(tensor) if box.numel]
            pieces.extend((piece, tensor.to_local().detach()) for piece in shards)
    return pieces


def local_boxes(tensor: torch.Tensor) -> list[Box]:
    """The boxes of a tensor that this rank holds: of a DTensor its shard, of any other the whole."""
    if is_dtensor(tensor):
        return [Box(*each) for each in shard_boxes(tensor)]
    return [whole_box(tensor.shape)]


def assign(tensors: Sequence[tuple[str, int, tuple[int, ...]]], world_size: int) -> list[list[Piece]]:
    """Which pieces each rank writes of replicated tensors, given as (name, bytes of an element, shape).

    The largest pieces are assigned first, each to the rank that has least: greedy scheduling, longest job first.
    """
    pieces = [
        (piece, piece.box.numel * itemsize)
        for name, itemsize, shape in tensors
        for piece in _cut(name, itemsize, shape, world_size)
    ]
    # Names and offsets break ties, so that the order in which a rank knows its tensors makes no difference.
    pieces.sort(key=lambda entry: (-entry[1], entry[0].name, entry[0].box.offsets))
    assigned: list[list[Piece]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for piece, size in pieces:
        least = loads.index(min(loads))
        assigned[least].append(piece)
        loads[least] += size
    return assigned


def covers(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether boxes lie within a tensor of this shape, do not overlap, and leave nothing out.

    The time grows with the number of boxes and not with its square, since boxes come from files too. A sum of boxes is
    known by its corners, each with the sign of its mixed difference (as in a summed-area table). So the boxes are the
    whole, each element once, where their signed corners add up to those of the whole.
    """
    if any(len(box.sizes) != len(shape) or len(box.offsets) != len(shape) for box in boxes):
        return False
    for box in boxes:
        if any(
            at < 0 or length < 0 or at + length > whole
            for at, length, whole in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            return False
    filled = [box for box in boxes if box.numel]
    # A dimension that no box is cut along has the same two ends in all, and need not be looked at.
    cut = [dim for dim, whole in enumerate(shape) if any(box.sizes[dim] != whole for box in filled)]
    if len(cut) > _MOST_CUT_DIMENSIONS:
        return False
    corners: Counter[tuple[int, ...]] = Counter()
    for box in filled:
        _add_corners(corners, box, cut, 1)
    if math.prod(shape):
        _add_corners(corners, whole_box(shape), cut, -1)
    return not any(corners.values())


def _add_corners(corners: Counter[tuple[int, ...]], box: Box, cut: Sequence[int], sign: int) -> None:
    """Count the corners of a box in the dimensions `cut`; with each step from a beginning to an end the sign turns."""
    ends = [((box.offsets[dim], 1), (box.offsets[dim] + box.sizes[dim], -1)) for dim in cut]
    for corner in itertools.product(*ends):
        corners[tuple(at for at, _ in corner)] += sign * math.prod(turn for _, turn in corner)


def _cut(name: str, itemsize: int, shape: tuple[int, ...], world_size: int) -> list[Piece]:
    whole = whole_box(shape)
    if world_size == 1 or not shape or whole.numel * itemsize < _SMALLEST_CUT or shape[0] < 2:
        return [Piece(name, whole)]
    # Along the first dimension alone: a piece is then contiguous, in memory and in a file.
    count = min(world_size, shape[0])
    edges = [shape[0] * at // count for at in range(count + 1)]
    rest = shape[1:]
    return [Piece(name, Box((begin, *(0,) * len(rest)), (end - begin, *rest))) for begin, end in pairwise(edges)]


def _values(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    if piece.box.sizes == tuple(tensor.shape):
        return tensor
    return tensor.narrow(0, piece.box.offsets[0], piece.box.sizes[0])


def _is_first_of_its_mesh(tensor: DTensor) -> bool:
    """Whether this rank is the first along the dimensions of the World's mesh that the tensor's own mesh leaves out.

    Along these each line of ranks holds the same: a model that is sharded in a mesh with `tensor`, and has no plan for
    that, is in whole in several of them. A mesh of the user's own, which is no part of the World's, has no such lines.
    """
    world = World.current()
    mesh, names = None if world is None else world.mesh, tensor.device_mesh.mesh_dim_names or ()
    ours = () if mesh is None else mesh.mesh_dim_names or ()
    if mesh is None or not set(names) & set(ours):
        return True
    # One rank is no line: copies of a divided model are sharded over a `shard` of one, which the World's mesh has not.
    if not {name for name, size in zip(names, tensor.device_mesh.shape, strict=True) if size > 1} <= set(ours):
        return True
    return all(mesh.get_local_rank(each) == 0 for each in ours if each not in names)


def _writes_its_shard(name: str, tensor: DTensor) -> bool:
    """Whether this rank is the one that writes the shard that it holds, of those that hold the same.

    A hash of the name picks the replica, so that the tensors of a model are spread over all replicas.
    """
    place = tensor.device_mesh.get_coordinate()
    if place is None or not _is_first_of_its_mesh(tensor):
        return False
    choice = zlib.crc32(name.encode())
    return all(
        place[dim] == choice % tensor.device_mesh.size(dim)
        for dim, placement in enumerate(tensor.placements)
        if placement.is_replicate()
    )
