"""A copy of a sharded model's tensors, each rank's parts alone, and arithmetic on parts.

Contract: FSDP modules cannot be copied, since their hooks belong to one module. `copy_shards` gives a module of the
same tree and names whose parameters are DTensors over copies of this rank's parts. It has no forward pass of its own.
Its `state_dict` has the names and shards that the model's has, so checkpoints treat it as the model. Weights that are
tied stay tied. `parts` lists a model's tensors in a fixed order, each as the plain tensor that this rank holds:
what is done to elements one by one, such as averaging, is done to parts, without communication.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from allstep.parallel import PlainNames, is_dtensor, is_fully_sharded, unwrap


def is_in_parts(module: nn.Module) -> bool:
    """Whether any of a module's parameters are sharded over ranks."""
    return any(is_dtensor(each) for each in module.parameters())


@torch.no_grad()
def copy_shards(module: nn.Module) -> nn.Module:
    """The tensors of a sharded module, copied, in a module of the same names; wrappers inside of it are left out."""
    gather_nothing(module)
    saved = frozenset(map(PlainNames(module).plain, module.state_dict()))
    tensors: dict[int, torch.Tensor] = {}
    modules: dict[int, nn.Module] = {}

    def copied(each: nn.Module, prefix: str) -> nn.Module:
        if id(each) in modules:
            return modules[id(each)]
        copy = modules[id(each)] = nn.Module()
        for name, parameter in each.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in tensors:
                tensors[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(copy, name, tensors[id(parameter)])
        for name, buffer in each.named_buffers(recurse=False, remove_duplicate=False):
            own = tensors.setdefault(id(buffer), buffer.detach().clone())
            copy.register_buffer(name, own, persistent=f"{prefix}{name}" in saved)
        for name, child in each.named_modules(remove_duplicate=False):
            if name and "." not in name:
                copy.add_module(name, copied(unwrap(child), f"{prefix}{name}."))
        return copy

    return copied(module, "")


def gather_nothing(module: nn.Module) -> None:
    """Have parameters that a forward pass has left gathered be in parts again, with the values of the parts."""
    for each in module.modules():
        if is_fully_sharded(each):
            each.reshard()  # type: ignore[operator]


def parts(module: nn.Module, *, buffers: bool) -> Iterator[torch.Tensor]:
    """The parameters, and the buffers too if asked, as the tensors of which this rank's parts consist."""
    for parameter in module.parameters():
        yield _part(parameter)
    for buffer in module.buffers() if buffers else ():
        yield _part(buffer)


def _part(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if is_dtensor(tensor) else tensor).detach()
