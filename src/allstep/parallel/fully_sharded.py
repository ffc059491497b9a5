"""A model in parts over ranks: torch's `fully_shard` (FSDP2) by units, and what an engine asks of such a model.

Contract: `shard_module` is `World.wrap` in a mesh with a `shard` dimension. Before: every rank has built the same
module and calls this at the same point. After: the module is the same object, its parameters are DTensors of which this
rank holds its part, with the values that rank 0 had, and gradients are averaged over the ranks of `shard`, and of
`replicate`, in backward. Each unit is gathered for its forward and its backward pass and freed behind them, in one
collective. What belongs to no unit is gathered once for the whole pass.

Which units there are says `allstep.parallel.units`.

`unreduced` and `without_gradients` are what accumulation and a rank without a batch need; `engine.dummy_step` calls
them. All of it goes by public names of torch 2.9 and later.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from allstep.cuda import has_pinned_memory
from allstep.errors import ArgumentError, ArgumentTypeError, ParallelError
from allstep.parallel.buckets import sparse_layer
from allstep.parallel.buffers import broadcast_from_first
from allstep.parallel.dtensor import is_dtensor
from allstep.parallel.meta_weights import check_beginnings, has_meta_tensors, materialise
from allstep.parallel.units import CONTAINERS, Units, choose_units

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

log = logging.getLogger("allstep.parallel")

_NORMS_WITH_STATISTICS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
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
    reshard_after_forward: bool | int | None = None,
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
            them, for speed. A number that divides the ranks of `shard` keeps them in parts over so many. By default all
            are freed but the parameters that belong to no unit.
        cpu_offload: keep this rank's parts, and so gradients and optimizer states, in the host's memory.
        ignored: parameters that stay whole on each rank. They begin with rank 0's values, and their gradients are
            averaged one by one as they come in backward, so they are the same on all ranks, as in DDP. Every rank's
            backward pass has to reach the same of them.

    Raises:
        ParallelError, ArgumentError, ArgumentTypeError: as `check_sharding` does; nothing is changed then.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    ignoring = set(ignored)
    check_sharding(
        module, mesh, units=units, precision=precision, reshard_after_forward=reshard_after_forward, ignored=ignoring
    )
    chosen, dtype = choose_units(module, units), _DTYPES[precision]
    whole = [name for name, each in module.named_parameters() if each in ignoring]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    # What the whole module returns is in float32, so that a loss is.
    outer_policy = policy if dtype is None else replace(policy, output_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=has_pinned_memory(device.type)) if cpu_offload else OffloadPolicy()
    on_meta = has_meta_tensors(module)
    exact = {} if dtype is None else _exact_policies(module, dtype)
    units_within = [*exact, *(each for each in chosen if each not in exact)]
    for unit, own in _with_own_parameters((*units_within, module), ignoring):
        for one in own:
            if not (is_dtensor(one) or one.is_contiguous()):  # channels_last, say, which parts do not keep
                one.data = one.data.contiguous()
        if not on_meta:
            _settle(own, device)
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=outer_policy if unit is module else exact.get(unit, policy),
            offload_policy=offload,
            ignored_params=ignoring or None,
        )
    for unit in (*units_within, module):
        _follow_first_pass(unit)
    if on_meta:
        materialise(module, torch.device("cpu") if cpu_offload else device, device)
    else:
        for each in (*module.buffers(), *ignoring):
            each.data = each.data.to(device)
    named = dict(module.named_parameters())  # anew, since what was on "meta" is another object now
    _average_whole(module, [named[name] for name in whole], mesh)
    return module


def _exact_policies(module: nn.Module, dtype: torch.dtype) -> dict[nn.Module, MixedPrecisionPolicy]:
    """Submodules that compute in the dtype of their statistics, as under autocast: BatchNorm takes no two dtypes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    kept = [each for each in module.modules() if each is not module and isinstance(each, _NORMS_WITH_STATISTICS)]
    return {
        each: MixedPrecisionPolicy(param_dtype=each.running_mean.dtype, output_dtype=dtype)
        for each in kept
        if each.running_mean is not None
    }


def _with_own_parameters(
    units: Iterable[nn.Module], ignored: Collection[nn.Parameter]
) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Each unit with what is gathered with it: its parameters that no unit before it has."""
    found, done = [], set(map(id, ignored))
    for unit in units:
        own = [each for each in unit.parameters() if id(each) not in done]
        done.update(map(id, own))
        found.append((unit, own))
    return found


def check_sharding(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    units: Units = None,
    precision: str = "no",
    reshard_after_forward: bool | int | None = None,
    cpu_offload: bool = False,
    ignored: Collection[nn.Parameter] = (),
) -> None:
    """Raise what `shard_module` would refuse, with the same arguments, before anything is done to the module.

    Raises:
        ParallelError: precision is unknown, the module or a part of it is sharded already, units name no submodule, or
            a parameter has no dimension or another dtype than those that are gathered with it.
        ArgumentError, ArgumentTypeError: units, reshard_after_forward or ignored cannot be meant.
    """
    if is_fully_sharded(module):
        raise ParallelError("the module is sharded already; wrap it once")
    if isinstance(module, CONTAINERS):
        raise ParallelError(
            f"the module is a {type(module).__name__}, which has no forward pass to be gathered for; wrap a module "
            "that has one and calls what is in it, or each of these by itself"
        )
    if sparse := sparse_layer(module):
        raise ParallelError(
            f"{sparse} gives sparse gradients, which are not reduced in parts; make it with sparse=False"
        )
    if precision not in _DTYPES:
        raise ParallelError(f'precision is {precision!r}; it must be one of "no", "fp16", "bf16"')
    ranks = mesh.size(mesh.ndim - 1)
    if type(reshard_after_forward) is int and (reshard_after_forward < 1 or ranks % reshard_after_forward):
        raise ArgumentError(
            f"reshard_after_forward is {reshard_after_forward}; give True or False, or a number of ranks that divides "
            f"the {ranks} of shard"
        )
    names = {id(each): name for name, each in module.named_parameters()}
    for given in ignored:
        if id(given) not in names:
            raise ArgumentTypeError(
                f"ignored has a {type(given).__name__} that is no parameter of the module; give some of its parameters"
            )
    check_beginnings(module)
    chosen = choose_units(module, units)
    if twice := next(filter(is_fully_sharded, chosen), None):
        raise ParallelError(
            f"a {type(twice).__name__} in the module is sharded already, by fully_shard or another wrap, and would be "
            "a unit; wrap the whole module once, or give units= that leave it out"
        )
    for unit, own in _with_own_parameters((*chosen, module), ignored):
        _check_parameters(unit, {names[id(each)]: each for each in own if not is_dtensor(each)})


def _check_parameters(unit: nn.Module, own: Mapping[str, nn.Parameter]) -> None:
    """Raise ParallelError for parameters of a unit that torch cannot put in parts, or not in one message together."""
    by_dtype: dict[torch.dtype, str] = {}
    for name, each in own.items():
        if not each.dim():
            raise ParallelError(
                f"{name} is a scalar, which has no dimension to be in parts over; make it a parameter of one element, "
                f"nn.Parameter(torch.ones(1)), or have it stay whole by ignored=[model.{name}]"
            )
        if each.requires_grad:
            by_dtype.setdefault(each.dtype, name)
    if len(by_dtype) > 1:
        shown = " and ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in by_dtype.items())
        raise ParallelError(
            f"{shown}, and their gradients would be reduced in one message, as those of a {type(unit).__name__}; "
            "give them one dtype, or have units= name submodules that hold one dtype each"
        )


def _settle(own: list[nn.Parameter], device: torch.device) -> None:
    """Move a unit's parameters to the device and give them rank 0's values: no more than one unit is there whole."""
    plain = [each for each in own if not is_dtensor(each)]
    for each in plain:
        each.data = each.data.to(device)
    broadcast_from_first(plain)


def _average_whole(module: nn.Module, parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Have parameters that are in no parts be the same on all ranks of a mesh, from now on."""
    broadcast_from_first(parameters)
    groups = mesh.get_all_groups()

    def average(parameter: torch.Tensor) -> None:
        if parameter.grad is None or module in _UNREDUCED:
            return
        gradient = parameter.grad.contiguous()
        gradient /= mesh.size()
        for group in groups:
            dist.all_reduce(gradient, group=group)
        if gradient is not parameter.grad:  # which is laid out as its parameter is, channels_last say
            parameter.grad.copy_(gradient)

    for each in parameters:
        # Also of those that are frozen, since they may be unfrozen.
        requires_grad = each.requires_grad
        each.requires_grad_(True).register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
        each.requires_grad_(requires_grad)


# What an engine asks


_UNREDUCED: WeakSet[nn.Module] = WeakSet()
"""The modules inside of `unreduced`."""


@contextmanager
def unreduced(module: Any) -> Iterator[None]:
    """Have the gradients of backward passes added up whole on this rank; those after it reduce them too."""
    module.set_requires_gradient_sync(False)
    _UNREDUCED.add(module)
    try:
        yield
    finally:
        _UNREDUCED.discard(module)
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


def _follow_first_pass(unit: nn.Module) -> None:
    """Note them, so that they can be had between a forward and its backward pass, in which the unit is not gathered.

    They are made in the first pass. Were that in inference mode, as an evaluation before training may be, nothing could
    train them, so the unit is gathered outside of it then.
    """

    def gather(unit: Any, *_: Any) -> None:
        before.remove()
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                unit.unshard()

    def note(unit: nn.Module, *_: Any) -> None:
        behind.remove()
        _GATHERED[unit] = list(unit.parameters())

    before = unit.register_forward_pre_hook(gather, prepend=True)
    behind = unit.register_forward_pre_hook(note)


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
