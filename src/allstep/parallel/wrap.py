"""DDP around one module, and out of it again.

Contract: `World.wrap` calls `wrap_module` with its device and size. Before: every rank has built the same module and
calls this at the same point, since DDP compares and broadcasts parameters. After: the module is on the device, and
gradients of a world of several are averaged over ranks in backward. A world of one gets its own module back, moved.
What is refused is refused before anything is done: the module is as it was then, on its device.
In a mesh gradients are averaged over its data ranks, and with `shard` in it the module is put in parts: see
`fully_sharded`. With `tensor` in it and a plan for that, submodules are divided first: see `tensor_parallel`.
`rewrap` follows a module that has changed since; see `allstep.parallel.replica`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from allstep.errors import ArgumentTypeError, ParallelError
from allstep.parallel.activation_checkpointing import recompute_activations, units_to_checkpoint
from allstep.parallel.buffers import broadcast_from_first
from allstep.parallel.compilation import compile_units, units_to_compile
from allstep.parallel.dtensor import is_dtensor
from allstep.parallel.float8 import linears_in_float8
from allstep.parallel.fully_sharded import check_sharding, is_fully_sharded, shard_module
from allstep.parallel.meta_weights import check_beginnings, has_meta_tensors, materialise
from allstep.parallel.replica import Replica
from allstep.parallel.timed_ddp import TimedDDP
from allstep.parallel.torch_private import can_time_ddp, compiled_from
from allstep.protocol.heartbeat import RankActivity
from allstep.suggestions import unknown_option

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

    from allstep.parallel.tensor_parallel import TensorPlan

_DDP_OPTIONS = frozenset(inspect.signature(DistributedDataParallel.__init__).parameters) - {"self", "module"}
_OWN_OPTIONS = (
    "sync_batchnorm",
    "deterministic",
    "units",
    "precision",
    "reshard_after_forward",
    "tensor_plan",
    "checkpoint_activations",
    "compile",
    "compile_options",
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WITHOUT_SYNC_BATCHNORM = ("cpu", "mps", "xla")  # torch has it on CUDA, XPU and what other backends bring
_HOW_TO_SHARD = ("units", "reshard_after_forward")
_SHARD_OPTIONS = frozenset(inspect.signature(shard_module).parameters) - {"module", "device", "mesh"}


def sharded_parameter(module: nn.Module) -> str | None:
    """The name of a parameter that is sharded over ranks; None where there is none."""
    return next((name for name, each in module.named_parameters() if is_dtensor(each)), None)


def wrap_module(
    module: nn.Module,
    device: torch.device,
    world_size: int,
    *,
    sync_batchnorm: bool = False,
    deterministic: bool = True,
    activity: RankActivity | None = None,
    mesh: DeviceMesh | None = None,
    model_mesh: DeviceMesh | None = None,
    tensor_plan: TensorPlan | None = None,
    checkpoint_activations: Any = None,
    compile: Any = False,
    compile_options: Mapping[str, Any] | None = None,
    in_float8: bool = False,
    **ddp_options: Any,
) -> nn.Module:
    """Move a module to a device and, when there are peers, wrap it in DDP, or shard it.

    Args:
        module: what to train. One without a parameter that requires a gradient is only moved: DDP refuses it, and
            there is nothing to average.
        device: this rank's device.
        world_size: number of ranks; with 1 nothing but the move happens.
        sync_batchnorm: turn BatchNorm layers into SyncBatchNorm, which exists on CUDA and devices like it, and is
            refused on the CPU, MPS and XLA in a world of any size.
        deterministic: fix the order in which DDP adds gradients before the first iteration, at the cost of one
            all-reduce now, so that a resumed run equals an unbroken one to the last bit; see
            `allstep.parallel.buckets`. Without effect with static_graph, mixed_precision or sparse gradients.
        activity: told of backward passes and, on the CPU, when this rank waits for the others; see
            `allstep.parallel.timed_ddp`. None measures nothing.
        mesh: of the world. With `shard` in it, what follows are the arguments of `shard_module`: units, precision,
            reshard_after_forward, cpu_offload and ignored. Without, units and reshard_after_forward mean nothing.
        model_mesh: that of the world for a model in parts: the same, or one with a `shard` of one rank besides.
        tensor_plan: how submodules are divided over `tensor` of the mesh, by their names: styles of
            torch.distributed.tensor.parallel, or names of those such as "colwise" and "rowwise". By default what the
            model offers as `tensor_plan` or, in Hugging Face's way, `tp_plan`; {} divides nothing. It is checked, and
            means nothing more, where the mesh has no `tensor`.
        checkpoint_activations: units whose activations are computed anew in the backward pass: classes, a function of a
            submodule, or n for every n-th of `units`. See `allstep.parallel.activation_checkpointing`.
        compile: True for the whole module, or classes or a function of a submodule for units that are compiled one by
            one. See `allstep.parallel.compilation`.
        compile_options: of torch.compile.
        in_float8: have linear layers multiply in float8. See `allstep.parallel.linears_in_float8`.
        ddp_options: arguments of `DistributedDataParallel`, over the defaults `gradient_as_bucket_view=True` and, on
            CUDA, `device_ids=[device.index]`.

    Raises:
        ParallelError: no module was given, it is wrapped, sharded or lazy, SyncBatchNorm or float8 was asked for where
            there is none, or tensor_plan, checkpoint_activations or compile does not fit the module or the mesh.
        ArgumentTypeError: an option that DistributedDataParallel, or `shard_module`, does not have, in a world of any
            size.
    """
    if not isinstance(module, nn.Module):
        raise ParallelError(f"module is {module!r}; wrap a torch.nn.Module")
    if isinstance(module, DistributedDataParallel):
        raise ParallelError("the module is wrapped in DDP already; wrap the bare module, once")
    if lazy := next((name for name, each in module.named_parameters() if is_lazy(each)), None):
        raise ParallelError(
            f"{lazy} has no shape before the module's first forward pass, and ranks share parameters from here on; "
            "call the module on a batch before wrap, on every rank"
        )
    before_float8: dict[nn.Module, nn.Module] = {}
    units = ddp_options.get("units")
    if in_float8 and callable(units) and not isinstance(units, type):  # a predicate sees layers as they were
        ddp_options["units"] = lambda each: units(before_float8.get(each, each))
    recomputed = units_to_checkpoint(module, checkpoint_activations, units)
    compiled = units_to_compile(module, compile, compile_options)
    put_over_ranks = _way_over_ranks(
        module, device, world_size, sync_batchnorm, deterministic, activity, mesh, model_mesh, tensor_plan, ddp_options
    )
    if in_float8:
        before_float8.update(linears_in_float8(module, device))
    # Nothing can be refused any more.
    wrapped = put_over_ranks()
    in_place_of = {before: now for now, before in before_float8.items()}
    recompute_activations(in_place_of.get(each, each) for each in recomputed)
    compile_units((in_place_of.get(each, each) for each in compiled), compile_options)
    return wrapped


def _way_over_ranks(
    module: nn.Module,
    device: torch.device,
    world_size: int,
    sync_batchnorm: bool,
    deterministic: bool,
    activity: RankActivity | None,
    mesh: DeviceMesh | None,
    model_mesh: DeviceMesh | None,
    tensor_plan: TensorPlan | None,
    ddp_options: dict[str, Any],
) -> Callable[[], nn.Module]:
    """What puts the module over the ranks; all that can be refused beforehand is, and nothing has changed."""
    dimensions = () if mesh is None else mesh.mesh_dim_names or ()
    styles: dict[str, ParallelStyle] = {}
    if tensor_plan is not None or "tensor" in dimensions:
        from allstep.parallel.tensor_parallel import styles_of  # it imports DTensor
    if mesh is not None and "tensor" in dimensions:
        styles = styles_of(module, tensor_plan, mesh["tensor"].size())
    elif tensor_plan is not None:  # so that what passes here passes in a mesh too
        styles_of(module, tensor_plan)
    if mesh is not None and "shard" in dimensions:
        return _way_in_parts(module, styles, device, mesh, ddp_options)
    units = ddp_options.get("units")
    for name in _HOW_TO_SHARD:  # the same script runs in any mesh
        ddp_options.pop(name, None)
    if given := [each for each in ("cpu_offload", "ignored") if ddp_options.pop(each, None)]:
        said = f"the mesh has {', '.join(dimensions)}" if dimensions else "there is no mesh"
        raise ParallelError(
            f"wrap got {given[0]}=, which only a model in parts can have, and {said}: open the world with "
            'allstep.init(mesh={"shard": -1}), or start it by allstep run --mesh shard=-1'
        )
    if sharded := sharded_parameter(module):
        raise ParallelError(
            f"parameter {sharded} is a DTensor: the module is sharded already, by fully_shard or a tensor-parallel "
            "plan, and reduces its gradients itself. Train it as it is, without wrap, or give wrap the whole module "
            "and the plan as tensor_plan="
        )
    if styles and mesh is not None and _data_dimensions(mesh):
        assert model_mesh is not None
        return _way_in_parts(module, styles, device, model_mesh, {"units": units, **ddp_options})
    # Also in a world of one, so that what passes alone passes over several.
    if unknown := unknown_option("wrap", ddp_options, _OWN_OPTIONS, _DDP_OPTIONS, "DistributedDataParallel"):
        raise ArgumentTypeError(unknown)
    if styles and mesh is not None:
        check_beginnings(module)
        return partial(_divided_alone, module, styles, device, mesh)
    if sync_batchnorm and device.type in _WITHOUT_SYNC_BATCHNORM:
        raise ParallelError(
            f"sync_batchnorm=True, but SyncBatchNorm runs on CUDA and its like, and the device is {device}; give "
            'sync_batchnorm=world.device.type == "cuda", or use a normalisation that needs no peers, such as GroupNorm'
        )
    over = () if mesh is None else _data_dimensions(mesh)
    if world_size == 1:
        return partial(module.to, device)
    # All ranks of a mesh without data ranks compute every batch together.
    if (mesh is not None and not over) or not any(each.requires_grad for each in module.parameters()):
        return lambda: (_with_sync_batchnorm(module) if sync_batchnorm else module).to(device)
    # Gradients that are views of the buckets save a copy of all gradients.
    defaults: dict[str, Any] = {"gradient_as_bucket_view": True}
    if mesh is not None:
        defaults["process_group"] = mesh.get_group(over[0])
    if device.type == "cuda":
        defaults["device_ids"] = [device.index]
    return partial(_in_ddp, module, device, sync_batchnorm, deterministic, activity, defaults | ddp_options)


def _in_ddp(
    module: nn.Module,
    device: torch.device,
    sync_batchnorm: bool,
    deterministic: bool,
    activity: RankActivity | None,
    options: dict[str, Any],
) -> nn.Module:
    is_timed = activity is not None and device.type == "cpu" and can_time_ddp()
    norms = [
        (outer, name, each)
        for outer in module.modules()
        for name, each in outer.named_children()
        if isinstance(each, _BATCH_NORMS)
    ]
    try:
        if sync_batchnorm:
            module = _with_sync_batchnorm(module)
        wrapped = (TimedDDP if is_timed else Replica)(
            module.to(device), deterministic=deterministic, sync_batchnorm=sync_batchnorm, **options
        )
    except BaseException:  # the values of options are DDP's to judge
        for outer, name, each in norms:
            setattr(outer, name, each)
        raise
    # Only now, so that the pass that fixes the buckets is not measured.
    wrapped.activity = activity
    hold_group(wrapped)
    return wrapped


def _with_sync_batchnorm(module: nn.Module) -> nn.Module:
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return converted


def _way_in_parts(
    module: nn.Module, styles: Mapping[str, Any], device: torch.device, mesh: DeviceMesh, options: dict[str, Any]
) -> Callable[[], nn.Module]:
    """What puts the module in parts over a mesh: it is divided first, so that each rank shards what it has then."""
    if unknown := unknown_option("wrap", options, _OWN_OPTIONS, _SHARD_OPTIONS, "a model in parts"):
        raise ArgumentTypeError(unknown)
    options = {**options, "ignored": list(options.get("ignored") or ())}
    over = mesh[_data_dimensions(mesh)]
    check_sharding(module, over, **options)
    if styles and type(frees := options.get("reshard_after_forward")) is int:
        raise ParallelError(
            f"reshard_after_forward is {frees}, a number of ranks, which torch does not take for layers that "
            "tensor_plan divides; give True or False"
        )
    ignored = set(map(id, options["ignored"]))
    for name in styles:
        if any(id(each) in ignored for each in module.get_submodule(name).parameters()):
            raise ParallelError(
                f"ignored has a parameter of {name}, which tensor_plan divides; leave it out of one of the two"
            )

    def in_parts() -> nn.Module:
        if styles:
            from allstep.parallel.tensor_parallel import divide_module

            divide_module(module, styles, mesh["tensor"], device)
        return shard_module(module, device, over, **options)

    return in_parts


def _divided_alone(module: nn.Module, styles: Mapping[str, Any], device: torch.device, mesh: DeviceMesh) -> nn.Module:
    """The module divided over ranks that compute all batches together."""
    from allstep.parallel.tensor_parallel import divide_module, keeping_ties, reduce_partial_gradients

    divide_module(module, styles, mesh["tensor"], device)
    if has_meta_tensors(module):
        with keeping_ties(module):
            materialise(module, device, device)
    else:
        module = module.to(device)
        broadcast_from_first(module.parameters())
    reduce_partial_gradients(module)
    return module


def _data_dimensions(mesh: DeviceMesh) -> tuple[str, ...]:
    """The dimensions whose ranks are given different data."""
    return tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")


def rewrap(module: nn.Module) -> None:
    """Have DDP follow what has changed in a wrapped module since: parameters frozen, unfrozen, added, replaced or cast.

    The wrapper stays the same object.

    Collective: every rank calls it behind the same change. All ranks get rank 0's parameters and buffers, so that new
    ones begin alike. Hooks, options and gradients stay, and so does the optimizer, which must be given new parameters
    as without DDP. In a world of one it does nothing. Nor does it with a model in parts, which follows what is frozen
    and unfrozen by itself, and takes no new parameters.

    Args:
        module: what `wrap` gave, compiled or not.

    Raises:
        ParallelError: the module is not one that `wrap` put into DDP, or DDP cannot wrap it as it is now.
    """
    if is_fully_sharded(module) or sharded_parameter(module):  # it goes by what requires a gradient in each pass
        return
    while not isinstance(module, DistributedDataParallel) and (original := compiled_from(module)) is not None:
        module = original
    if not isinstance(module, Replica):
        raise ParallelError(
            f"rewrap was given a {type(module).__name__}, which world.wrap has not put into DDP"
            + ("; wrap it: model = world.wrap(module)" if isinstance(module, nn.Module) else "")
        )
    module.rewrap()


def hold_group(module: DistributedDataParallel) -> None:
    """Let a module's process group end without Python's lock, also where the module is its last owner.

    The destructor of a gloo group waits for its threads, which need Python's lock to let go of a collective's tensors.
    Python's own reference to a group gives the lock up while it is freed. DDP's reducer does not, so that a model which
    is freed after its World has closed can stand still for ever.
    """
    # Attributes are freed in the order in which they were set: behind the reducer this reference is the last one.
    vars(module)["_allstep_group"] = _GroupReference(module.process_group)


class _GroupReference:
    """A group that its holder's copies, pickled or not, do not share."""

    def __init__(self, group: object = None) -> None:
        self.group = group

    def __reduce__(self) -> tuple[type[_GroupReference], tuple[()]]:
        return _GroupReference, ()


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside DDP, DataParallel and torch.compile, in any nesting; itself where there is none."""
    while True:
        if isinstance(module, DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif (original := compiled_from(module)) is not None:
            module = original
        else:
            return module
