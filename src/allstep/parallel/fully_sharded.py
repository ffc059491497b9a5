"""A model in parts over ranks: torch's `fully_shard` (FSDP2) by units, and what an engine asks of such a model.

Contract: `shard_module` is `World.wrap` in a mesh with a `shard` dimension. Before: every rank has built the same
module and calls this at the same point. After: the module is the same object, its parameters are DTensors of which this
rank holds its part, with the values that rank 0 had, and gradients are averaged over the ranks of `shard`, and of
`replicate`, in backward. Each unit is gathered for its forward and its backward pass and freed behind them, in one
collective. What belongs to no unit is gathered once for the whole pass.

Which units. `choose_units` goes by classes, by a predicate, or by size: then they are the outermost submodules with 1
to 25 % of the elements each. A submodule that several units use becomes a unit of its own. A parameter that several
submodules hold (tied weights) stays with the whole module, and so do units with a part of it: else each of its holders
would go on with a tensor of its own.

`unreduced` and `without_gradients` are what accumulation and a rank without a batch need; `engine.dummy_step` calls
them. All of it goes by public names of torch 2.9 and later.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from allstep.errors import ArgumentError, ArgumentTypeError, ParallelError
from allstep.parallel.buffers import broadcast_from_first
from allstep.parallel.meta_weights import has_meta_tensors, materialise

log = logging.getLogger("allstep.parallel")

Units = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool] | None
"""What says which submodules are units: classes, a predicate, or None for a choice by size."""

_SMALLEST_UNIT, _LARGEST_UNIT = 0.01, 0.25  # of the module's elements
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # they have no forward pass
_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_fully_sharded(module: object) -> bool:
    """Whether `fully_shard` was applied to this module."""
    # Importing it takes a second, and where nothing has imported it nothing is sharded.
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def shard_module(
    module: nn.Module,
    device: torch.device,
    mesh: DeviceMesh,
    *,
    units: Units = None,
    precision: str = "no",
    reshard_after_forward: bool | None = None,
    cpu_offload: bool = False,
    ignored: Iterable[nn.Parameter] = (),
) -> nn.Module:
    """Put a module in parts over the ranks of a mesh, in place.

    Args:
        module: what to train; on any device, or on "meta".
        device: this rank's device.
        mesh: one dimension to shard over, or two, of which the first has copies.
        units: classes of the submodules that are gathered in one piece, such as a transformer's block; or a predicate
            on a submodule; or None for a choice by size.
        precision: "no", or "bf16" or "fp16": parameters are gathered and computed with in 16 bits, inputs are cast,
            and gradients are reduced and applied in float32. What the module returns is in float32.
        reshard_after_forward: free units between forward and backward pass, which then gathers them again. False keeps
            them, for speed. By default all are freed but the parameters that belong to no unit.
        cpu_offload: keep this rank's parts, and so gradients and optimizer states, in the host's memory.
        ignored: parameters that stay whole on each rank. Nobody averages their gradients.

    Raises:
        ParallelError: precision is unknown, the module is sharded already, or units name no submodule.
        ArgumentError, ArgumentTypeError: units or ignored cannot be meant.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if is_fully_sharded(module):
        raise ParallelError("the module is sharded already; wrap it once")
    ignoring = _ignored(module, ignored)
    chosen = choose_units(module, units)
    dtype = _checked_dtype(precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    # What the whole module returns is in float32, so that a loss is.
    outer_policy = policy if dtype is None else replace(policy, output_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    on_meta = has_meta_tensors(module)
    done: set[int] = set()
    for unit in (*chosen, module):
        own = [each for each in unit.parameters() if id(each) not in done and each not in ignoring]
        done.update(map(id, own))
        if not on_meta:
            _settle(unit, own, device)
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=outer_policy if unit is module else policy,
            offload_policy=offload,
            ignored_params=ignoring or None,
        )
    for unit in (*chosen, module):
        _note_when_gathered(unit)
    if on_meta:
        materialise(module, torch.device("cpu") if cpu_offload else device, device)
    else:
        for each in (*module.buffers(), *ignoring):
            each.data = each.data.to(device)
    return module


def _checked_dtype(precision: str) -> torch.dtype | None:
    if precision not in _DTYPES:
        raise ParallelError(f'precision is {precision!r}; it must be one of "no", "fp16", "bf16"')
    return _DTYPES[precision]


def _ignored(module: nn.Module, ignored: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    given, known = list(ignored), {id(each) for each in module.parameters()}
    for each in given:
        if id(each) not in known:
            raise ArgumentTypeError(
                f"ignored has a {type(each).__name__} that is no parameter of the module; give some of its parameters"
            )
    return set(given)


def _settle(unit: nn.Module, own: list[nn.Parameter], device: torch.device) -> None:
    """Move a unit's parameters to the device and give them rank 0's values: no more than one unit is there whole."""
    plain = [each for each in own if not isinstance(each, DTensor)]
    for each in plain:
        each.data = each.data.to(device)
    broadcast_from_first(plain)


# Units


def choose_units(module: nn.Module, units: Units) -> list[nn.Module]:
    """The submodules that are gathered in one piece each, the innermost first; the module itself is none of them.

    Raises:
        ParallelError: classes or a predicate that no submodule fits.
        ArgumentError: units is none of what it may be.
    """
    if units is None:
        chosen = _by_size(module)
    else:
        chosen = [each for each in module.modules() if each is not module and _fits(each, units)]
        if not chosen and not _fits(module, units):
            classes = sorted({type(each).__name__ for each in module.modules()})
            raise ParallelError(f"units is {units!r}, which no submodule fits; the module has {', '.join(classes)}")
        if bad := next((each for each in chosen if isinstance(each, _CONTAINERS)), None):
            raise ParallelError(
                f"units has {type(bad).__name__}, which has no forward pass before which it could be gathered; "
                "name the class of what is in it"
            )
    return _without_split_ties(module, _with_shared(module, chosen))


def _fits(module: nn.Module, units: Any) -> bool:
    if isinstance(units, type) or (isinstance(units, tuple) and all(isinstance(each, type) for each in units)):
        return isinstance(module, units)
    if not callable(units):
        raise ArgumentError(f"units is {units!r}; give a class of modules, several in a tuple, or a function of one")
    return bool(units(module))


def _by_size(module: nn.Module) -> list[nn.Module]:
    total = sum(each.numel() for each in module.parameters())
    found: dict[nn.Module, None] = {}

    def descend(outer: nn.Module) -> None:
        for each in outer.children():
            share = sum(one.numel() for one in each.parameters()) / max(total, 1)
            is_large = share > _LARGEST_UNIT or isinstance(each, _CONTAINERS)
            if share < _SMALLEST_UNIT:
                continue
            before = len(found)
            if is_large:
                descend(each)
            # What cannot be divided is gathered in one piece, however large.
            if not isinstance(each, _CONTAINERS) and (not is_large or len(found) == before):
                found[each] = None

    descend(module)
    return [each for each in module.modules() if each in found]


def _with_shared(module: nn.Module, chosen: list[nn.Module]) -> list[nn.Module]:
    """The units and what several of them use, innermost first."""
    outermost = [unit for unit in chosen if not any(unit in other.modules() for other in chosen if other is not unit)]
    users: dict[nn.Module, int] = {}
    for unit in outermost:
        for each in unit.modules():
            users[each] = users.get(each, 0) + 1
    shared = {each for each, count in users.items() if count > 1 and next(each.parameters(), None) is not None}
    inside = {inner for each in shared for inner in each.modules() if inner is not each}
    units = {*chosen, *(each for each in shared - inside if not isinstance(each, _CONTAINERS))}
    found = [each for each in module.modules() if each in units and each is not module][::-1]
    return sorted(found, key=lambda each: sum(1 for _ in each.modules()))  # what is inside of another has fewer


def _without_split_ties(module: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """The units without those that hold a part of what is tied to something outside of them."""
    holders: dict[int, list[nn.Module]] = {}
    for each in module.modules():
        for parameter in dict.fromkeys(each.parameters(recurse=False)):
            holders.setdefault(id(parameter), []).append(each)
    ties = [of for of in holders.values() if len(of) > 1]
    kept = []
    for unit in units:
        inside = set(unit.modules())
        if any(0 < sum(each in inside for each in of) < len(of) for of in ties):
            log.info("%s has a weight that is tied to one outside of it, so it is no unit", type(unit).__name__)
        else:
            kept.append(unit)
    return kept


# What an engine asks


@contextmanager
def unreduced(module: Any) -> Iterator[None]:
    """Have the gradients of backward passes added up whole on this rank; those after it reduce them too."""
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def forget_gradients(module: nn.Module) -> None:
    """Forget what an accumulation group that is begun again has added up whole on this rank. Collective."""
    reset = getattr(module, "reset_iter_state", None)  # of torch 2.13: a pass that an exception has left is forgotten
    if reset is not None:
        reset()
    for unit in module.modules():
        if is_fully_sharded(unit):
            unit.unshard()  # type: ignore[operator]
            for each in unit.parameters():
                each.grad = None
            unit.reshard()  # type: ignore[operator]


_GATHERED: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()
"""The parameters of each unit as they are while it is gathered, from its first forward pass on: the same ever after."""


def _note_when_gathered(unit: nn.Module) -> None:
    """Note them, so that they can be had between a forward and its backward pass, in which the unit is not gathered."""

    def note(unit: nn.Module, *_: Any) -> None:
        handle.remove()
        _GATHERED[unit] = list(unit.parameters())

    handle = unit.register_forward_pre_hook(note)


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Have backward passes give the module's parameters gradients of zero, while its collectives match other ranks'.

    Also those through forward passes that were before.
    """
    hooked: dict[int, Any] = {}

    def hook(parameters: Iterable[nn.Parameter]) -> None:
        for each in parameters:
            if each.requires_grad and id(each) not in hooked:
                hooked[id(each)] = each, each.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]

    units = [each for each in module.modules() if is_fully_sharded(each)]
    for each in units:
        hook(_GATHERED.get(each, ()))
    # Behind the unit's own hook, so that these are the gathered parameters, which alone get gradients.
    handles = [each.register_forward_pre_hook(lambda unit, *_: hook(unit.parameters())) for each in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, registered in hooked.values():
            registered.remove()
