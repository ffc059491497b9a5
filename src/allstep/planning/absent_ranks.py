"""A module on ranks that are not there, without values: wrapped as for real ranks, with what DDP does to gradients.

Contract: `fake_ranks` is open. `put_over_ranks` has the module wrapped by the code that wraps it for ranks that are
there; what it holds are tensors without values of `without_values` or `lose_values`. DDP alone is not run, since its
reducer is compiled code that reads values. `GradientBuckets` does what it does: gradients lie in buckets from the
beginning, in which each new gradient is written and which are reduced when they are full. `watched_gradients` tells a
`StepTrace` of gradients as they come.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from allstep.errors import ParallelError
from allstep.parallel import is_fully_sharded, unify_buffers
from allstep.planning.step_trace import StepTrace
from allstep.planning.torch_private import values_were_read
from allstep.protocol.foreign_text import printable

Step = Callable[[nn.Module, Any], torch.Tensor]
Wrapping = Callable[[nn.Module, torch.device, DeviceMesh | None, DeviceMesh | None, dict[str, Any]], nn.Module]
"""Wraps a module for the ranks of a mesh, and of a mesh for a model in parts; without a mesh for one rank alone."""

_BUCKET, _FIRST_BUCKET = 25 * 2**20, 2**20  # bytes, of DDP's own
_NOT_PLANNED = ("compile", "compile_options")


@dataclass(frozen=True, slots=True)
class Training:
    """What is to be planned.

    Attributes:
        module: as `World.wrap` takes it, with values or on "meta".
        batch: what one rank's forward pass takes, in tensors of the right shapes.
        ranks: how many there are.
        mesh: sizes of its dimensions by their names, outermost first; empty for none.
        device: of a rank.
        options: of `World.wrap`.
        step: gives the loss of a batch.
        optimizer: makes one of parameters; None for none.
        accumulate: batches in an optimizer step.
        wrap: puts the module over ranks.
        rebuilt: a batch with something else in the place of each tensor.
    """

    module: nn.Module
    batch: Any
    ranks: int
    mesh: Mapping[str, int]
    device: torch.device
    wrap: Wrapping
    rebuilt: Callable[[Any, Callable[[Any], Any]], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    step: Step | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = torch.optim.AdamW
    accumulate: int = 1


def without_values(module: nn.Module, mode: Any, device: torch.device) -> nn.Module:
    """A copy of a module on a device whose parameters and buffers have no values."""
    replaced: dict[int, Any] = {
        id(each): _emptied(each, mode, device) for each in (*module.parameters(), *module.buffers())
    }
    try:
        return copy.deepcopy(module, replaced)
    except Exception as error:
        raise ParallelError(
            f"the {type(module).__name__} cannot be copied, which a plan does so as to leave it alone: {error}"
        ) from error


def lose_values(module: nn.Module, mode: Any, device: torch.device) -> None:
    """Put tensors without values in the place of a module's parameters and buffers; tied ones stay tied."""
    replaced: dict[int, Any] = {}
    for each in module.modules():
        for name, tensor in (*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)):
            if id(tensor) not in replaced:
                replaced[id(tensor)] = tensor, _emptied(tensor, mode, device)  # kept, so that no other has its id
            setattr(each, name, replaced[id(tensor)][1])


def _emptied(tensor: torch.Tensor, mode: Any, device: torch.device) -> torch.Tensor:
    with mode:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def without_value(leaf: Any, device: torch.device, trace: StepTrace) -> Any:
    """A tensor of a batch without its values, which the trace knows as one; anything else as it is."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    trace.hold("inputs", [made])
    return made.requires_grad_(leaf.requires_grad)


def meshes_of(mesh_sizes: Mapping[str, int], device: torch.device) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """The mesh, and that for a model in parts; see `allstep.world.device_mesh`."""
    names, sizes = tuple(mesh_sizes), tuple(mesh_sizes.values())
    if not names:
        return None, None
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    if "shard" in names or len(names) < 2:
        return mesh, mesh
    wider = init_device_mesh(device.type, (sizes[0], 1, sizes[1]), mesh_dim_names=(names[0], "shard", names[1]))
    return mesh, wider


def groups_of(*meshes_and_ranks: Any) -> dict[str, tuple[str, int]]:
    """Dimension and size of each group, by its name; a dimension's name comes before that of all ranks."""
    *meshes, ranks = meshes_and_ranks
    world = dist.group.WORLD
    assert world is not None
    found: dict[str, tuple[str, int]] = {world.group_name: ("all", ranks)}
    for mesh in meshes:
        for name in () if mesh is None else mesh.mesh_dim_names or ():
            group = mesh.get_group(name)
            found[group.group_name] = (name, group.size())
    return found


def put_over_ranks(
    training: Training, module: nn.Module, mesh: DeviceMesh | None, model_mesh: DeviceMesh | None
) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """The module wrapped, and the group over which DDP would reduce its gradients."""
    options = {name: value for name, value in training.options.items() if name not in _NOT_PLANNED}
    if options.get("precision") == "float8":
        options["precision"] = "bf16"
    is_in_parts = "shard" in training.mesh
    if "tensor" in training.mesh and not is_in_parts:
        from allstep.parallel import styles_of  # with it DTensor is imported, for which most ranks have no use

        is_in_parts = bool(styles_of(module, options.get("tensor_plan"), training.mesh["tensor"]))
    # It is there already, and tensors without values are not moved in place.
    vars(module)["to"] = lambda *_, **__: module
    try:
        if is_in_parts:
            return training.wrap(module, training.device, mesh, model_mesh, options), None
        model = training.wrap(module, training.device, None, None, options)
    finally:
        del vars(module)["to"]
    over = [name for name in training.mesh if name != "tensor"]
    group = dist.group.WORLD if mesh is None else mesh.get_group(over[0]) if over else None
    if group is None or group.size() == 1 or not any(each.requires_grad for each in model.parameters()):
        return model, None
    return model, group


def broadcasts_of(training: Training) -> bool:
    """Whether DDP would give buffers rank 0's values."""
    return bool(training.options.get("broadcast_buffers", True))


class GradientBuckets:
    """What DDP does with gradients: each is written into a bucket, which is reduced when all of its own are there."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, *, broadcasts: bool) -> None:
        self.reduces = True
        self.tensors: list[torch.Tensor] = []
        self._group = group
        filling: list[nn.Parameter] = []
        for each in [one for one in model.parameters() if one.requires_grad][::-1]:
            if filling and filling[0].dtype != each.dtype:
                self._close(filling)
            filling.append(each)
            if sum(one.nbytes for one in filling) >= (_BUCKET if self.tensors else _FIRST_BUCKET):
                self._close(filling)
        self._close(filling)
        if broadcasts and next(model.buffers(), None) is not None:
            model.register_forward_pre_hook(lambda module, _: unify_buffers(module) if self.reduces else None)

    def _close(self, filling: list[nn.Parameter]) -> None:
        if not filling:
            return
        bucket = torch.zeros(sum(one.numel() for one in filling), dtype=filling[0].dtype, device=filling[0].device)
        self.tensors.append(bucket)
        left, count = [0], len(filling)
        for part, each in zip(torch.split(bucket, [one.numel() for one in filling]), filling, strict=True):
            each.register_post_accumulate_grad_hook(self._writer(bucket, part, left, count))  # type: ignore[no-untyped-call]
        filling.clear()

    def _writer(self, bucket: torch.Tensor, part: torch.Tensor, left: list[int], count: int) -> Callable[[Any], None]:
        def write(parameter: torch.Tensor) -> None:
            if not self.reduces:  # it stays where it is, beside the bucket
                return
            view = part.view(parameter.shape)
            gradient = parameter.grad
            assert gradient is not None
            if gradient.untyped_storage() is not bucket.untyped_storage():  # else it was added there
                view.copy_(gradient)
                parameter.grad = view
            left[0] += 1
            if left[0] == count:
                left[0] = 0
                dist.all_reduce(bucket, group=self._group)

        return write


@contextmanager
def watched_gradients(model: nn.Module, trace: StepTrace) -> Iterator[None]:
    """Have the trace know gradients when they come; those of gathered units are what a collective is to reduce."""
    handles, known = [], set()

    def watch(parameters: Iterable[torch.Tensor]) -> None:
        for each in parameters:
            if each.requires_grad and id(each) not in known:
                known.add(id(each))
                handles.append(each.register_post_accumulate_grad_hook(note))  # type: ignore[no-untyped-call]

    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            trace.hold("communication" if units else "gradients", [parameter.grad])

    units = [each for each in model.modules() if is_fully_sharded(each)]
    if not units:
        watch(model.parameters())
    # Behind the unit's own hook, which gathers it.
    handles += [each.register_forward_pre_hook(lambda unit, _: watch(unit.parameters())) for each in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def said_where_values_are_read() -> Iterator[None]:
    """Have a step that asks for a value end in an error that names the line."""
    try:
        yield
    except Exception as error:
        if not values_were_read(error):
            raise
        torch_folder = str(Path(torch.__file__).parent)
        frames = traceback.extract_tb(error.__traceback__)
        own = [each for each in frames if not each.filename.startswith((torch_folder, str(Path(__file__).parent)))]
        at = f" in {own[-1].filename}:{own[-1].lineno}, {own[-1].line}" if own else ""
        raise ParallelError(
            printable(
                f"the step reads values of a tensor{at}; a plan has shapes and no values. Give world.plan a step "
            )
            + "without that: step=lambda model, batch: ..."
        ) from error
