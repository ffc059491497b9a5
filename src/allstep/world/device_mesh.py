"""The mesh of a World: torch's `DeviceMesh` over groups of the World's own, and the data ranks that follow from it.

Contract: `init` calls `choose_mesh` before anything is connected, so that sizes which do not make up the world are an
error there, and `open_mesh` on every rank once the default group is open. That makes the groups of each dimension, with
the World's time limit. A dimension that is the whole world is the default group itself. They end with the World.
Without a mesh nothing is made, and each rank is given data of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from allstep.errors import WorldError
from allstep.placement import DataRanks, MeshShape, Placement, parse_mesh, resolve_mesh
from allstep.placement.mesh import VARIABLE, check_mesh, in_words
from allstep.world import current
from allstep.world.process_group import Group

log = logging.getLogger("allstep.world")


def choose_mesh(asked: Mapping[str, int] | None, environ: Mapping[str, str]) -> Mapping[str, int] | None:
    """The mesh that is meant, where there is one: what ALLSTEP_MESH says, before what the script does.

    Raises:
        MeshError: either cannot be meant, whatever the world is.
    """
    if asked is not None:
        check_mesh(asked)
    outside = parse_mesh(environ[VARIABLE]) if environ.get(VARIABLE) else None
    if outside is not None and asked is not None and outside != dict(asked):
        log.info("the mesh is %s, as %s says, and not the script's %s", in_words(outside), VARIABLE, in_words(asked))
    return asked if outside is None else outside


def mesh_shape(mesh: Mapping[str, int] | None, placement: Placement) -> MeshShape | None:
    """The mesh's dimensions for the ranks that there are. Raises MeshError where they do not make up the world."""
    return None if mesh is None else resolve_mesh(mesh, placement)


def open_mesh(shape: MeshShape | None, group: Group | None, device: torch.device) -> DeviceMesh | None:
    """The mesh of ranks that have met; None where none was asked for. Collective.

    Raises:
        WorldError: the device is one that torch makes no meshes of.
    """
    if shape is None or group is None:
        return None
    if device.type == "xla":
        raise WorldError(f"mesh is {shape}, but torch has no DeviceMesh of {device.type} devices; leave mesh out")
    ranks = torch.arange(group.world_size).view(shape.sizes)
    groups = [_groups_along(ranks, dim, group) for dim in range(len(shape.sizes))]
    if len(groups) == 1:
        return DeviceMesh.from_group(groups[0], device.type, mesh_dim_names=shape.names)
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=shape.names)


def open_model_mesh(mesh: DeviceMesh | None, group: Group | None) -> DeviceMesh | None:
    """The mesh for a model in parts: that of the World, where need be with a `shard` of one rank. Collective.

    Copies of a model that is divided over `tensor` have their gradients averaged by `fully_shard`, which DDP does not
    do for DTensors, and that shards over one dimension at least.
    """
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if mesh is None or group is None or "shard" in names or len(names) < 2:
        return mesh
    ranks = mesh.mesh.cpu().unsqueeze(1)
    alone = _groups_along(ranks, 1, group)
    groups = [mesh.get_group(names[0]), alone, mesh.get_group(names[1])]
    return DeviceMesh.from_group(groups, mesh.device_type, ranks, mesh_dim_names=(names[0], "shard", names[1]))


def _groups_along(ranks: torch.Tensor, dim: int, group: Group) -> dist.ProcessGroup:
    """This rank's group along one dimension of the mesh."""
    if ranks.shape[dim] == ranks.numel() and dist.group.WORLD is not None:
        return dist.group.WORLD
    lines = ranks.movedim(dim, -1).reshape(-1, ranks.shape[dim]).tolist()
    return group.split(lines)


def has_dimension(mesh: DeviceMesh | None, name: str) -> bool:
    """Whether there is a mesh with a dimension of this name."""
    return mesh is not None and name in (mesh.mesh_dim_names or ())


def current_data_ranks() -> DataRanks:
    """The open World's place among those that are given different data; the only one where no World is open."""
    world: Any = current.current()
    return DataRanks() if world is None else cast(DataRanks, world.data_ranks)
