"""A model of a World: its precision, what goes over ranks, and what the World remembers of it.

Contract: `World.wrap` calls `wrap_in_world` with what it has. What `wrap_module` gives is noted among the World's
modules, which engines and checkpoints ask for. Precision is said once: in a mesh with `shard` it is that of the parts,
elsewhere autocast around the model's forward pass. Float8 is bfloat16 in which linear layers multiply in float8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from allstep.parallel import Compilations, Precision, autocast, unwrap, wrap_module
from allstep.parallel.early_optimizers import parameters_before, watch_replaced
from allstep.protocol.heartbeat import RankActivity
from allstep.world.casting import Casting
from allstep.world.device_mesh import has_dimension
from allstep.world.internals import WorldInternals


def wrap_in_world(
    module: nn.Module,
    device: torch.device,
    world_size: int,
    mesh: DeviceMesh | None,
    model_mesh: DeviceMesh | None,
    inner: WorldInternals,
    options: dict[str, Any],
) -> nn.Module:
    """Wrap a module for the ranks of a World; see `World.wrap`."""
    activity = None if inner.reporter is None else inner.activity  # plain DDP where no service would be told
    before = parameters_before(module) if isinstance(module, nn.Module) else {}
    wrapped = wrap_for_ranks(module, device, world_size, mesh, model_mesh, options, activity)
    inner.add_wrapped(wrapped)
    inner.hold(watch_replaced(before, wrapped.parameters()))
    if options.get("compile") and inner.compilations is None:
        inner.compilations = Compilations()
    return wrapped


def wrap_for_ranks(
    module: nn.Module,
    device: torch.device,
    world_size: int,
    mesh: DeviceMesh | None,
    model_mesh: DeviceMesh | None,
    options: Mapping[str, Any],
    activity: RankActivity | None = None,
) -> nn.Module:
    """Wrap a module in the precision that is asked for; see `World.wrap`."""
    options = dict(options)
    if options.get("precision") == "float8":
        options |= {"precision": "bf16", "in_float8": True}
    casts: Precision = "no" if has_dimension(mesh, "shard") else options.pop("precision", "no")
    autocast(device.type, casts)  # raises for one that there is not
    wrapped = wrap_module(module, device, world_size, activity=activity, mesh=mesh, model_mesh=model_mesh, **options)
    if casts != "no":
        Casting(unwrap(wrapped), casts).hook()
    return wrapped
