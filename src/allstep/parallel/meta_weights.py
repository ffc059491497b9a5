"""Weights that are made when the model is in parts: no rank ever holds all of them.

Contract: in `materialised_later` the parameters of modules that are built are on torch's "meta" device: they have
shapes and no values. Buffers are as ever, and the random generator is afterwards where it was before. `materialise`
gives parameters values once the module is sharded: submodule by submodule, in the order of `Module.modules`, it has
`reset_parameters` draw the whole tensors of that one submodule on the host, and keeps this rank's part. So all ranks
draw the same numbers. They are those that the unsharded model would be built with, as long as it draws once for each
parameter and in that order, as torch's own modules do. A tied weight is the one of its first holder.

What can go wrong: a submodule with parameters of its own that `reset_parameters` does not set is a ParallelError that
names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from allstep.errors import ParallelError
from allstep.parallel.dtensor import is_dtensor


@contextmanager
def materialised_later() -> Iterator[None]:
    """Build modules whose parameters have no values."""

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # One that has been here, and is tied, stays the same object.
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    # Not `torch.device("meta")`, under which buffers would lose their values too, and few classes can make them anew.
    hook = register_module_parameter_registration_hook(without_values)  # type: ignore[arg-type]
    drawn = torch.get_rng_state()
    try:
        yield
    finally:
        hook.remove()
        torch.set_rng_state(drawn)


def has_meta_tensors(module: nn.Module) -> bool:
    """Whether parameters of the module have no values yet."""
    return any(each.is_meta for each in module.parameters())


@torch.no_grad()
def materialise(module: nn.Module, device: torch.device, buffers: torch.device) -> None:
    """Give a module on "meta" its values.

    Args:
        module: sharded; parts that are not keep whole tensors.
        device: where its parameters are to be.
        buffers: where its buffers are to be.

    Raises:
        ParallelError: as `check_beginnings`.
    """
    check_beginnings(module)
    kept = [(each, name, one) for each in module.modules() for name, one in each.named_buffers(recurse=False)]
    module.to_empty(device=device)
    for holder, name, buffer in kept:
        setattr(holder, name, buffer.to(buffers))
    done: set[int] = set()
    for name, each in _owners(module):
        _draw(name, each, done)


def check_beginnings(module: nn.Module) -> None:
    """Raise ParallelError where a submodule of a module on "meta" does not say how its tensors begin."""
    for name, each in _owners(module) if has_meta_tensors(module) else ():
        if not callable(getattr(each, "reset_parameters", None)):
            raise ParallelError(
                f"{_named(name, each)} was built without values and has no reset_parameters(), so nobody knows how its "
                f"{', '.join(_own(each))} begin. Give the class that method, or build the model with "
                "world.building(meta=False)"
            )


def _owners(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The submodules that hold parameters themselves."""
    return [(name, each) for name, each in module.named_modules() if _own(each)]


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a submodule holds itself."""
    return dict(module.named_parameters(recurse=False))


def _named(name: str, module: nn.Module) -> str:
    return f"{name or 'the module'} ({type(module).__name__})"


def _draw(name: str, module: nn.Module, done: set[int]) -> None:
    """Have one submodule draw its parameters whole, and keep this rank's part of them."""
    kept = _own(module)
    for key, each in kept.items():
        whole = torch.empty(each.shape, dtype=each.dtype)
        if whole.is_floating_point():
            whole.fill_(torch.nan)  # so that what is left unset shows
        setattr(module, key, nn.Parameter(whole, requires_grad=each.requires_grad))
    module.reset_parameters()  # type: ignore[operator]
    for key, each in kept.items():
        whole = getattr(module, key).detach()
        if whole.is_floating_point() and whole.isnan().any():
            raise ParallelError(
                f"reset_parameters() of {_named(name, module)} leaves {key} unset; set it there, or build the model "
                "with world.building(meta=False)"
            )
        if id(each) not in done:
            _fill(each, whole)
            done.add(id(each))
        setattr(module, key, each)


def _fill(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    if not is_dtensor(parameter):
        parameter.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor

    # Every rank has drawn the same, so that nothing has to be sent.
    mesh = parameter.device_mesh
    part = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())
