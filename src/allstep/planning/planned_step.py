"""A training step on tensors without values, by one process that stands for the first of many ranks.

Contract: `planned` copies the module without its values, has it wrapped for ranks that are not there by the code that
wraps it for those that are, and runs two optimizer steps under a `StepTrace`. The first one makes the optimizer's
states, the second is what every later one is like. The module with its gradients and hooks, the generators of random
numbers and the process group are afterwards as they were, and nothing of the model's size is ever held.

What is compiled is planned as it runs without. A plan is for kernels of the World's device; those may take memory for
themselves, which nobody sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from allstep.errors import ArgumentError, ArgumentTypeError, ParallelError
from allstep.parallel import is_dtensor, is_fully_sharded, unreduced
from allstep.planning.absent_ranks import (
    GradientBuckets,
    Training,
    broadcasts_of,
    groups_of,
    meshes_of,
    put_over_ranks,
    said_where_values_are_read,
    watched_gradients,
    without_value,
    without_values,
)
from allstep.planning.memory_plan import Plan
from allstep.planning.step_trace import StepTrace
from allstep.planning.torch_private import fake_ranks, fake_tensors


def planned(training: Training) -> Plan:
    """Run a step without values, and say what it took.

    Raises:
        ArgumentError, ArgumentTypeError, ParallelError: what `World.wrap` raises; the module is wrapped already; the
            step gives no loss, or reads a tensor's value; this torch lacks what plans need.
    """
    _check(training)
    mode = fake_tensors()
    with torch.random.fork_rng(devices=[]), fake_ranks(training.ranks):
        mesh, model_mesh = meshes_of(training.mesh, training.device)
        module = without_values(training.module, mode, training.device)
        # Not in the mode, in which torch could not compute with the numbers of ranks.
        model, group = put_over_ranks(training, module, mesh, model_mesh)
        with mode, said_where_values_are_read():
            buckets = None if group is None else GradientBuckets(model, group, broadcasts=broadcasts_of(training))
            optimizer = None if training.optimizer is None else training.optimizer(model.parameters())
            _check_steps_alone(optimizer)
            trace = StepTrace(groups_of(mesh, model_mesh, training.ranks), mode)
            on_host = bool(training.options.get("cpu_offload"))
            trace.hold("parameters", model.parameters(), on_host=on_host)
            trace.hold("inputs", model.buffers())
            if buckets is not None:
                trace.hold("gradients", buckets.tensors)
            with trace, watched_gradients(model, trace):
                for _ in range(2):
                    trace.forget_traffic()
                    _optimizer_step(training, model, buckets, optimizer, trace, on_host)
    held, peak, moment, host = trace.memory()
    return Plan(training.ranks, training.mesh, held, peak, moment, host, trace.traffic())


def _check(training: Training) -> None:
    module: Any = training.module
    if not isinstance(module, nn.Module):
        raise ParallelError(f"module is {module!r}; plan a torch.nn.Module")
    is_divided = any(is_dtensor(each) for each in module.parameters())
    if isinstance(module, DistributedDataParallel) or is_fully_sharded(module) or is_divided:
        raise ParallelError("the module is wrapped already; plan it before world.wrap")
    if isinstance(training.accumulate, bool) or not isinstance(training.accumulate, int) or training.accumulate < 1:
        raise ArgumentError(f"accumulate is {training.accumulate!r}; give the number of batches in an optimizer step")
    if isinstance(training.batch, DataLoader):
        raise ArgumentTypeError(
            f"batch is a {type(training.batch).__name__}; give what a rank is given in an iteration, such as "
            "next(iter(loader))"
        )
    optimizer: Any = training.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ArgumentTypeError(
            f"optimizer is a {kind} of parameters that have values; give what makes one: "
            f"optimizer=lambda parameters: torch.optim.{kind}(parameters)"
        )


def _check_steps_alone(optimizer: torch.optim.Optimizer | None) -> None:
    closure = None if optimizer is None else inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ArgumentError(
            f"optimizer is {type(optimizer).__name__}, which runs the step itself, by a closure, as often as it likes; "
            "plan with optimizer=None, and add what it keeps"
        )


def _optimizer_step(
    training: Training,
    model: nn.Module,
    buckets: GradientBuckets | None,
    optimizer: torch.optim.Optimizer | None,
    trace: StepTrace,
    on_host: bool,
) -> None:
    for part in range(training.accumulate):
        is_last = part == training.accumulate - 1
        if buckets is not None:
            buckets.reduces = is_last
        batch = training.rebuilt(training.batch, lambda leaf: without_value(leaf, training.device, trace))
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
