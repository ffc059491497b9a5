"""A training step on tensors without values, by one process that stands for the first of many ranks.

Contract: `planned` copies the module without its values, has it wrapped for ranks that are not there by the code that
wraps it for those that are, and runs two optimizer steps under a `StepTrace`. The first one makes the optimizer's
states, the second is what every later one is like. The module with its gradients and hooks, the generators of random
numbers and the process group are afterwards as they were, and nothing of the model's size is ever held.

DDP alone is not run, since its reducer is compiled code that reads values. `_Buckets` does what it does: gradients lie
in buckets from the beginning, in which each new gradient is written and which are reduced when they are full. What is
compiled is planned as it runs without. A plan is for kernels of the World's device; those may take memory for
themselves, which nobody sees.
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
from torch.nn.parallel import DistributedDataParallel

from allstep.errors import ArgumentError, ArgumentTypeError, ParallelError
from allstep.parallel import is_dtensor, is_fully_sharded, unify_buffers, unreduced
from allstep.planning.memory_plan import Plan
from allstep.planning.step_trace import StepTrace
from allstep.planning.torch_private import fake_ranks, fake_tensors, values_were_read
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


def planned(training: Training) -> Plan:
    """Run a step without values, and say what it took.

    Raises:
        ArgumentError, ArgumentTypeError, ParallelError: what `World.wrap` raises; the module is wrapped already; the
            step gives no loss, or reads a tensor's value; this torch lacks what plans need.
    """
    _check(training)
    mode = fake_tensors()
    with torch.random.fork_rng(devices=[]), fake_ranks(training.ranks):
        mesh, model_mesh = _meshes(training)
        module = without_values(training.module, mode, training.device)
        # Not in the mode, in which torch could not compute with the numbers of ranks.
        model, group = _over_ranks(training, module, mesh, model_mesh)
        with mode, _said_where_values_are_read():
            buckets = None if group is None else _Buckets(model, group, broadcasts=_broadcasts(training))
            optimizer = None if training.optimizer is None else training.optimizer(model.parameters())
            trace = StepTrace(_groups(mesh, model_mesh, training.ranks), mode)
            on_host = bool(training.options.get("cpu_offload"))
            trace.hold("parameters", model.parameters(), on_host=on_host)
            trace.hold("inputs", model.buffers())
            if buckets is not None:
                trace.hold("gradients", buckets.tensors)
            with trace, _watched_gradients(model, trace):
                for _ in range(2):
                    trace.forget_traffic()
                    _optimizer_step(training, model, buckets, optimizer, trace, on_host)
    held, peak, moment, host = trace.memory()
    return Plan(training.ranks, training.mesh, held, peak, moment, host, trace.traffic())


def without_values(module: nn.Module, mode: Any, device: torch.device) -> nn.Module:
    """A copy of a module on a device whose parameters and buffers have no values."""
    replaced: dict[int, Any] = {}
    with mode:
        for each in (*module.parameters(), *module.buffers()):
            empty = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=device)
            is_parameter = isinstance(each, nn.Parameter)
            replaced[id(each)] = nn.Parameter(empty, each.requires_grad) if is_parameter else empty
    try:
        return copy.deepcopy(module, replaced)
    except Exception as error:
        raise ParallelError(
            f"the {type(module).__name__} cannot be copied, which a plan does so as to leave it alone: {error}"
        ) from error


def _check(training: Training) -> None:
    module: Any = training.module
    if not isinstance(module, nn.Module):
        raise ParallelError(f"module is {module!r}; plan a torch.nn.Module")
    is_divided = any(is_dtensor(each) for each in module.parameters())
    if isinstance(module, DistributedDataParallel) or is_fully_sharded(module) or is_divided:
        raise ParallelError("the module is wrapped already; plan it before world.wrap")
    if isinstance(training.accumulate, bool) or not isinstance(training.accumulate, int) or training.accumulate < 1:
        raise ArgumentError(f"accumulate is {training.accumulate!r}; give the number of batches in an optimizer step")
    optimizer: Any = training.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ArgumentTypeError(
            f"optimizer is a {kind} of parameters that have values; give what makes one: "
            f"optimizer=lambda parameters: torch.optim.{kind}(parameters)"
        )


def _meshes(training: Training) -> tuple[DeviceMesh | None, DeviceMesh | None]:
    """The mesh, and that for a model in parts; see `allstep.world.device_mesh`."""
    names, sizes = tuple(training.mesh), tuple(training.mesh.values())
    if not names:
        return None, None
    mesh = init_device_mesh(training.device.type, sizes, mesh_dim_names=names)
    if "shard" in names or len(names) < 2:
        return mesh, mesh
    wider = init_device_mesh(
        training.device.type, (sizes[0], 1, sizes[1]), mesh_dim_names=(names[0], "shard", names[1])
    )
    return mesh, wider


def _groups(*meshes_and_ranks: Any) -> dict[str, tuple[str, int]]:
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


def _over_ranks(
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


def _broadcasts(training: Training) -> bool:
    return bool(training.options.get("broadcast_buffers", True))


class _Buckets:
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
def _watched_gradients(model: nn.Module, trace: StepTrace) -> Iterator[None]:
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


def _optimizer_step(
    training: Training,
    model: nn.Module,
    buckets: _Buckets | None,
    optimizer: torch.optim.Optimizer | None,
    trace: StepTrace,
    on_host: bool,
) -> None:
    for part in range(training.accumulate):
        is_last = part == training.accumulate - 1
        if buckets is not None:
            buckets.reduces = is_last
        batch = training.rebuilt(training.batch, lambda leaf: _fake(leaf, training.device, trace))
        trace.phase = "forward"
        if is_last or not is_fully_sharded(model):
            _forward_and_backward(training, model, batch, trace)
        else:
            with unreduced(model):
                _forward_and_backward(training, model, batch, trace)
        del batch
    parameters = list(model.parameters())
    trace.hold("gradients", [each.grad for each in parameters if each.grad is not None], on_host=on_host)
    trace.phase = "optimizer"
    if optimizer is None:
        for each in parameters:
            each.grad = None
        return
    optimizer.step()
    states = [each for state in optimizer.state.values() for each in state.values()]
    trace.hold("optimizer", [each for each in states if isinstance(each, torch.Tensor)], on_host=on_host)
    optimizer.zero_grad()


def _forward_and_backward(training: Training, model: nn.Module, batch: Any, trace: StepTrace) -> None:
    loss: Any = (training.step or _sum_of_outputs)(model, batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        said = f"a tensor of {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"{loss!r}"
        raise ArgumentTypeError(
            f"the step returned {said}; return the loss, a tensor of one element: "
            "step=lambda model, batch: loss_of(model(batch))"
        )
    trace.phase = "backward"
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


def _fake(leaf: Any, device: torch.device, trace: StepTrace) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    trace.hold("inputs", [made])
    return made.requires_grad_(leaf.requires_grad)


def _sum_of_outputs(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss that a model gives by itself, or else the sum of what it gives."""
    if isinstance(batch, Mapping):
        given = model(**batch)
    else:
        given = model(*batch) if isinstance(batch, list | tuple) else model(batch)
    loss = given.get("loss") if isinstance(given, Mapping) else getattr(given, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    found = [each for each in _leaves(given) if each.is_floating_point()]
    if not found:
        raise ArgumentError(
            f"the module returned {type(given).__name__}, of which no loss can be made; say how: "
            "step=lambda model, batch: loss_of(model(batch))"
        )
    return torch.stack([each.float().sum() for each in found]).sum()


def _leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [each for item in items for each in _leaves(item)]


@contextmanager
def _said_where_values_are_read() -> Iterator[None]:
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
