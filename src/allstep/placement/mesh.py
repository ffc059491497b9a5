"""The mesh of a job: which ranks share a model, which share a batch, and how a person says so. Pure, without torch.

Contract: `parse_mesh` reads the text of `allstep run --mesh` and ALLSTEP_MESH, `resolve_mesh` checks what a script or
that text says against a `Placement`, and gives a `MeshShape`: its dimensions with their sizes, outermost first. Ranks
are numbered through it in that order, so that the ranks of the innermost dimension are neighbours.

- `replicate`, or by its other name `data`: copies of the model, each of which is given other data;
- `shard`: ranks that hold one copy of the model in parts (FSDP), each of which is given other data too;
- `tensor`: ranks that compute one batch together (tensor parallelism), so that all of them are given the very same.

A size of -1 is what is left of the ranks. `shard=-1` with no word on replicas stays inside a node: each node then holds
a whole copy. That takes ranks whose numbers follow each other on each node, which `check_nodes` looks at when they have
met: none of them knows it before. What can go wrong is a MeshError with the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from allstep.errors import MeshError
from allstep.placement.placement import Placement

VARIABLE = "ALLSTEP_MESH"
NAMES = ("replicate", "data", "shard", "tensor")
"""The dimensions that there are, outermost first."""

_REPLICAS = ("replicate", "data")
_RESERVED = {
    "context": "one sequence over several ranks",
    "pipeline": "one model's layers over several ranks, one after the other",
}


@dataclass(frozen=True, slots=True)
class DataRanks:
    """One rank's place among those that are given different data.

    Attributes:
        rank: which part of the data this process is given, from 0.
        size: how many parts there are.
        sharing: ranks that are given the same part, neighbours of each other; the first of them speaks for all where
            samples, outputs or metrics are counted.
        is_twin: whether this process is not the first of those, and so counts for nothing there.
    """

    rank: int = 0
    size: int = 1
    sharing: int = 1
    is_twin: bool = False

    @staticmethod
    def of(rank: int, world_size: int, sharing: int = 1) -> DataRanks:
        """The place of a process among all, of which `sharing` are given the same data at a time."""
        return DataRanks(rank // sharing, world_size // sharing, sharing, rank % sharing != 0)


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Dimensions and their sizes, outermost first; their product is the world's size.

    Attributes:
        names, sizes: of the dimensions.
        inside_nodes: whether the first is one of nodes, each of which is to hold a whole copy.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    inside_nodes: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return in_words(dict(zip(self.names, self.sizes, strict=True)))

    @property
    def sharing(self) -> int:
        """Ranks that are given the same batches."""
        return prod(size for name, size in zip(self.names, self.sizes, strict=True) if name == "tensor")


def in_words(mesh: Mapping[str, int]) -> str:
    """A mesh as `parse_mesh` reads it."""
    return ",".join(f"{name}={size}" for name, size in mesh.items())


def parse_mesh(text: str) -> dict[str, int]:
    """Read `replicate=2,shard=4`.

    Raises:
        MeshError: the text is none, or names what `check_mesh` refuses.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z_]+)\s*=\s*(-?[0-9]{1,7})\s*", part)
        if match is None:
            raise MeshError(f"mesh is {text!r}; it must be names with sizes, such as replicate=2,shard=4 or shard=-1")
        name, size = match[1], int(match[2])
        if name in found:
            raise MeshError(f"mesh is {text!r}, which names {name} twice")
        found[name] = size
    check_mesh(found)
    return found


def check_mesh(mesh: object) -> None:
    """Raise MeshError unless this maps known dimensions to sizes that can be meant, whatever the world is."""
    if not isinstance(mesh, Mapping) or not mesh:
        raise MeshError(f'mesh is {mesh!r}; give sizes by name, such as {{"replicate": 2, "shard": 4}}')
    for name, size in mesh.items():
        if name in _RESERVED:
            raise MeshError(
                f"mesh has {name}={size}, which would be {_RESERVED[name]}: allstep does not do that yet, and keeps "
                f"the name for it. Use {', '.join(NAMES)}"
            )
        if name not in NAMES:
            raise MeshError(f"mesh has {name!r}; its dimensions are {', '.join(NAMES)}")
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise MeshError(f"mesh has {name}={size!r}; a size is 1 or more, or -1 for what is left of the ranks")
    if all(name in mesh for name in _REPLICAS):
        raise MeshError("mesh has both replicate and data, which are two names of one dimension; give one of them")
    if len(left := [name for name, size in mesh.items() if size == -1]) > 1:
        raise MeshError(f"mesh has -1 for {' and '.join(left)}; only one size can be what is left of the ranks")


def resolve_mesh(mesh: Mapping[str, int], placement: Placement) -> MeshShape:
    """The mesh of a job whose ranks are placed as they are.

    Raises:
        MeshError: the sizes do not make up the world.
    """
    check_mesh(mesh)
    sizes = dict(mesh)
    world_size = placement.world_size
    known = prod(size for size in sizes.values() if size != -1)
    inside_nodes = sizes.get("shard") == -1 and placement.nodes > 1 and not any(name in sizes for name in _REPLICAS)
    if inside_nodes:
        per_node = placement.local_world_size
        if per_node * placement.nodes != world_size:
            raise MeshError(
                f"mesh is {in_words(mesh)}, which shards over the ranks of each node, but the {placement.nodes} nodes "
                f"have different numbers: {per_node} of {world_size} are here. Give replicate= and shard= as numbers"
            )
        if per_node % known:
            raise MeshError(
                f"mesh is {in_words(mesh)}, but the {per_node} ranks of a node cannot be divided by {known}"
            )
        sizes = {"replicate": placement.nodes, **sizes, "shard": per_node // known}
    elif -1 in sizes.values():
        if world_size % known:
            raise MeshError(f"mesh is {in_words(mesh)}, but {_world_in_words(placement)} cannot be divided by {known}")
        sizes = {name: world_size // known if size == -1 else size for name, size in sizes.items()}
    if prod(sizes.values()) != world_size:
        raise MeshError(
            f"mesh is {in_words(mesh)}, which is {prod(sizes.values())} ranks, but {_world_in_words(placement)}. "
            "Change the sizes, or have one be -1 for what is left, or start that many ranks"
        )
    names = tuple(name for name in NAMES if name in sizes)
    return MeshShape(names, tuple(sizes[name] for name in names), inside_nodes)


def check_nodes(shape: MeshShape, nodes: Sequence[int]) -> None:
    """Raise MeshError where a copy that was to be inside a node would be over several.

    Args:
        shape: of the mesh.
        nodes: the node of each rank.
    """
    ranks = len(nodes) // shape.sizes[0]
    for first in range(0, len(nodes) if shape.inside_nodes else 0, ranks):
        here = nodes[first : first + ranks]
        other = next((at for at, node in enumerate(here) if node != here[0]), None)
        if other is not None:
            raise MeshError(
                f"mesh is {shape}, with a copy of the model on each node, so ranks {first} to {first + ranks - 1} are "
                f"to be on one, but rank {first} is on node {here[0]} and rank {first + other} on node {here[other]}. "
                "Number ranks node by node, as srun --distribution=block and mpirun --map-by slot do, or give "
                "replicate= and shard= as numbers to shard over nodes"
            )


def _world_in_words(placement: Placement) -> str:
    over = f" on {placement.nodes} nodes" if placement.nodes > 1 else ""
    return f"the world has {placement.world_size} rank{'s' if placement.world_size > 1 else ''}{over}"
