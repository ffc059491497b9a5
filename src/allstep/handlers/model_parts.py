"""A copy of a sharded model's tensors, each rank's parts alone, and arithmetic on parts; a model's modes, kept.

Contract: FSDP modules cannot be copied, since their hooks belong to one module. `copy_shards` gives a module of the
same tree and names whose parameters are DTensors over copies of this rank's parts. It has no forward pass of its own.
Its `state_dict` has the names and shards that the model's has, so checkpoints treat it as the model. Weights that are
tied stay tied. What is done to elements one by one, such as copying and averaging, is done to parts, each the plain
tensor that this rank holds, without communication. Of two models that this is done to, each holds as much as the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from allstep.errors import EngineError
from allstep.parallel import PlainNames, is_dtensor, is_fully_sharded, unwrap


def is_in_parts(module: nn.Module) -> bool:
    """Whether any of a module's parameters are sharded over ranks."""
    return any(is_dtensor(each) for each in module.parameters())


def refuse_whole_copy(model: nn.Module, kind: str) -> None:
    """Raise EngineError where a model is in parts of which a handler of class `kind` has a copy from before that."""
    if is_in_parts(model):
        raise EngineError(
            f"this {kind} was made before world.wrap put the model in parts, and holds all of it; make it from what "
            f"wrap returns: {kind}(model, ...)"
        )


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


@torch.no_grad()
def copy_values(source: nn.Module, target: nn.Module, *, parameters: bool = True) -> None:
    """Copy the values of buffers, and of parameters too, into the tensors that the other model has."""
    for own, other in _pairs(target, source, parameters=parameters):
        own.copy_(other)


@torch.no_grad()
def swap_values(model: nn.Module, other: nn.Module) -> None:
    """Give each model the values of the other's parameters and buffers, bit for bit.

    Values and not tensors, since DDP, optimizers and compiled code hold on to a model's tensors.
    """
    for one, two in _pairs(model, other):
        kept = one.clone()
        one.copy_(two)
        two.copy_(kept)


def parts_by_kind(
    model: nn.Module, other: nn.Module, *, buffers: bool
) -> Collection[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Two models' parts, those of one device and dtype in two lists, as torch's functions of many tensors take them."""
    kinds: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for one, two in _pairs(model, other, buffers=buffers):
        ones, twos = kinds.setdefault((one.device, one.dtype), ([], []))
        ones.append(one)
        twos.append(two)
    return kinds.values()


def _pairs(
    model: nn.Module, other: nn.Module, *, parameters: bool = True, buffers: bool = True
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for each in (model, other):
        gather_nothing(each)
    if parameters:
        yield from zip(map(_part, model.parameters()), map(_part, other.parameters()), strict=True)
    if buffers:
        yield from zip(map(_part, model.buffers()), map(_part, other.buffers()), strict=True)


def _part(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if is_dtensor(tensor) else tensor).detach()


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Have each module be in the mode behind the body that it was in before."""
    before = [(each, each.training) for each in model.modules()]
    try:
        yield
    finally:
        for each, mode in before:
            each.training = mode
