"""`World.plan`: what a training would take, on ranks that need not be there.

Contract: `plan_training` reads a person's arguments, as `init` and `wrap` read theirs, and hands them to `planning`.
The mesh is resolved for ranks that are all on one node; over several, say `replicate` and `shard` in numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from allstep.errors import ArgumentError
from allstep.placement import Placement, Rendezvous, resolve_mesh
from allstep.placement.mesh import check_mesh
from allstep.planning import Plan, Training, bytes_of, plan_that_fits
from allstep.world.move import rebuilt
from allstep.world.wrapping import wrap_for_ranks


def plan_training(
    module: nn.Module,
    batch: Any,
    *,
    device: torch.device,
    world_size: int = 1,
    opened: DeviceMesh | None = None,
    mesh: Mapping[str, int] | None = None,
    ranks: int | None = None,
    step: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = torch.optim.AdamW,
    accumulate: int = 1,
    memory: int | str | None = None,
    **options: Any,
) -> Plan:
    """What training a module takes on each rank: memory and messages of a step, which runs without values or devices.

    Nothing is changed, and nothing of the model's size is held. The module may be one of `World.building(meta=True)`.

    Args:
        module: what `World.wrap` would be given.
        batch: what a rank is given in an iteration; only its shapes and dtypes count.
        device: of a rank; `World.plan` gives its own.
        world_size: ranks of the World; `World.plan` gives it.
        opened: mesh of the World; `World.plan` gives it.
        mesh: as for `init`, for any number of ranks on one node; by default the World's.
        ranks: how many there are; by default what the mesh's sizes make up, or else the World's.
        step: gives the loss of a model and a batch, before its backward pass. By default the model is called with the
            batch, unpacked where it is a tuple, list or mapping; its `loss` is taken, or what it gives is added up.
        optimizer: makes one of parameters; None for none.
        accumulate: batches in an optimizer step.
        memory: of a device, such as "80GB". Where the plan does not fit it, other meshes, `checkpoint_activations`,
            smaller batches and `cpu_offload` are tried, and `Plan.fitting` is the first that does.
        options: of `World.wrap`. `compile` changes nothing.

    Raises:
        ArgumentError, ArgumentTypeError, MeshError, ParallelError: what `init` and `wrap` raise of these arguments; the
            module is wrapped already, or the step gives no loss or reads a tensor's value.
    """
    limit = None if memory is None else bytes_of(memory)
    if ranks is not None and (isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1):
        raise ArgumentError(f"ranks is {ranks!r}; give how many there are, from 1")
    if mesh is not None:
        check_mesh(mesh)
    sizes: Mapping[str, int] = mesh or {}
    if mesh is None and opened is not None and ranks in (None, world_size):
        sizes = dict(zip(opened.mesh_dim_names or (), opened.shape, strict=True))
    if ranks is None:
        known = bool(sizes) and -1 not in sizes.values()
        ranks = prod(sizes.values()) if known else world_size
    if sizes:
        one_node = Placement("alone", world_size=ranks, local_world_size=ranks, rendezvous=Rendezvous("", ()))
        shape = resolve_mesh(sizes, one_node)
        sizes = dict(zip(shape.names, shape.sizes, strict=True))
    training = Training(
        module=module,
        batch=batch,
        ranks=ranks,
        mesh=sizes,
        device=device,
        wrap=wrap_for_absent_ranks,
        rebuilt=rebuilt,
        options=options,
        step=step,
        optimizer=optimizer,
        accumulate=accumulate,
    )
    return plan_that_fits(training, limit)


def wrap_for_absent_ranks(
    module: nn.Module,
    device: torch.device,
    mesh: DeviceMesh | None,
    model_mesh: DeviceMesh | None,
    options: dict[str, Any],
) -> nn.Module:
    """Wrap a module for the ranks of a mesh, or without one for a rank alone; the `Wrapping` of plans."""
    return wrap_for_ranks(module, device, 1 if mesh is None else mesh.size(), mesh, model_mesh, options)
