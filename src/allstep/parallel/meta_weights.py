"""Weights that are made when the model is in parts: no rank ever holds all of them.

Contract: in `materialised_later` modules are built on torch's "meta" device, with shapes and without values.
`materialise` gives them values once the module is sharded: submodule by submodule, in the order of `Module.modules`,
it has `reset_parameters` draw the whole tensors of that one submodule on the host, and keeps this rank's part. So all ranks
draw the same numbers, and the same as the unsharded model would be built with, as long as it draws in that order and
nowhere but in `reset_parameters`, as torch's own modules do. A weight that is tied is the one of its first holder.

What can go wrong: a submodule with tensors of its own that `reset_parameters` does not set is a ParallelError that
names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from allstep.errors import ParallelError


@contextmanager
def materialised_later() -> Iterator[None]:
    """Build modules without values."""
    with torch.device("meta"):
        yield


def has_meta_tensors(module: nn.Module) -> bool:
    """Whether anything of the module has no values yet."""
    return any(each.is_meta for each in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def materialise(module: nn.Module, device: torch.device, buffers: torch.device) -> None:
    """Give a module on "meta" its values.

    Args:
        module: sharded; parts that are not keep whole tensors.
        device: where its parameters are to be.
        buffers: where its buffers are to be.

    Raises:
        ParallelError: a submodule does not say how its tensors begin.
    """
    owners = [(name, each) for name, each in module.named_modules() if _own(each)]
    for name, each in owners:
        if not callable(getattr(each, "reset_parameters", None)):
            raise ParallelError(
                f"{name or 'the module'} ({type(each).__name__}) was built on the meta device and has no "
                f"reset_parameters(), so nobody knows how its {', '.join(_own(each))} begin. Give the class that "
                "method, or build the model with world.building(meta=False)"
            )
    module.to_empty(device=device)
    done: set[int] = set()
    for name, each in owners:
        _draw(name, each, done, buffers)


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a submodule holds itself."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _draw(name: str, module: nn.Module, done: set[int], buffers: torch.device) -> None:
    """Have one submodule draw its tensors whole, and keep this rank's part of them."""
    kept = _own(module)
    drawn: dict[str, torch.Tensor] = {}
    for key, each in kept.items():
        whole = torch.empty(each.shape, dtype=each.dtype)
        if whole.is_floating_point():
            whole.fill_(torch.nan)  # so that what is left unset shows
        is_parameter = isinstance(each, nn.Parameter)
        drawn[key] = nn.Parameter(whole, requires_grad=each.requires_grad) if is_parameter else whole
        setattr(module, key, drawn[key])
    module.reset_parameters()  # type: ignore[operator]
    for key, each in kept.items():
        whole = getattr(module, key).detach()
        if whole.is_floating_point() and whole.isnan().any():
            raise ParallelError(
                f"reset_parameters() of {name or 'the module'} ({type(module).__name__}) leaves {key} unset; set it "
                "there, or build the model with world.building(meta=False)"
            )
        if not isinstance(each, nn.Parameter):
            setattr(module, key, whole.to(buffers))
            continue
        if id(each) not in done:
            _fill(each, whole)
            done.add(id(each))
        setattr(module, key, each)


def _fill(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    # Every rank has drawn the same, so that nothing has to be sent.
    mesh = parameter.device_mesh
    part = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())
