"""Ready engines for supervised learning: a trainer and an evaluator around a model, an optimizer and a loss.

Contract: the model is what `world.wrap` gave (or any module); the loss is a mean over the batch's samples. The trainer
weighs it by `state.weight`, so that accumulated gradients are the mean over all samples of the group. A loss of several
parts is a mapping: their sum is trained, and each is shown. Neither engine waits for the device: outputs stay tensors.
What the trainer is given, it has its `Checkpoint` save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from allstep.coordination import Coordinator
from allstep.engine import Engine, Events
from allstep.errors import ArgumentTypeError
from allstep.handlers import EMA, GradientClipping, Schedule
from allstep.parallel import Precision, autocast, grad_scaler, unwrap
from allstep.trainers.step_parts import (
    AccumulationGroup,
    compiled,
    device_for,
    save_with,
    scaled_step,
    schedule_of,
    total_and_shown,
)
from allstep.world import World, internals, to_device

PrepareBatch = Callable[[Any, torch.device, bool], tuple[Any, Any]]
Loss: TypeAlias = torch.Tensor | Mapping[str, torch.Tensor]


def prepare_batch(batch: Any, device: torch.device, non_blocking: bool) -> tuple[Any, Any]:
    """The default `prepare_batch`: a batch of (x, y), moved to the device."""
    x, y = batch
    return to_device((x, y), device, non_blocking=non_blocking)


def create_supervised_trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], Loss],
    device: torch.device | str | None = None,
    non_blocking: bool = True,
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = lambda output: output,
    output_transform: Callable[[Any, Any, Any, Any], Any] = lambda x, y, y_pred, loss: loss,
    *,
    precision: Precision = "no",
    scaler: torch.amp.GradScaler | None = None,
    gradient_accumulation_steps: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    scheduler: Schedule | LRScheduler | None = None,
    ema: EMA | None = None,
    compile: bool | Mapping[str, Any] = False,
    samples_in: Callable[[Any], int] | None = None,
    model_fn: Callable[[nn.Module, Any], Any] = lambda model, x: model(x),
    coordinator: Coordinator | None = None,
) -> Engine:
    """An engine whose step is a forward pass, a backward pass and, when it is due, an optimizer step.

    Args:
        model: the model, wrapped or not.
        optimizer: its optimizer.
        loss_fn: `(y_pred, y) -> loss`, a scalar tensor, mean over the samples; or several by name, whose sum is
            trained.
        device: where batches go; by default the current world's device, else the model's.
        non_blocking: copy from pinned memory without waiting.
        prepare_batch: `(batch, device, non_blocking) -> (x, y)`.
        model_transform: applied to what the model returns before the loss.
        output_transform: `(x, y, y_pred, loss) -> output`; the loss given is detached and unweighted, and is the
            default output. Of several losses it is a dict with the parts, and their sum under "loss".
        precision: "no", "fp16" (autocast, with a GradScaler) or "bf16" (autocast).
        scaler: the GradScaler to use with "fp16"; by default one is made. It is `engine.state.scaler`.
        gradient_accumulation_steps: iterations whose gradients make one optimizer step.
        clip_norm: the largest norm of the gradients of a step; see `GradientClipping`.
        clip_value: the largest absolute value of a gradient's element; give this or `clip_norm`.
        scheduler: a `Schedule`, or a scheduler of torch that steps after each optimizer step. To have it step by epochs
            or a metric, attach a `Schedule` to the trainer instead.
        ema: an average of the weights, made but not attached.
        compile: have `torch.compile` compile the model, with these options where it is a mapping.
        samples_in: `batch -> int`, what accumulated batches are weighed by; by default rows.
        model_fn: `(model, x) -> y_pred`.
        coordinator: how ranks agree; by default the current world's.

    Raises:
        ArgumentError: an unknown precision, steps below 1, or limits of gradients that cannot be meant.
        ArgumentTypeError: scheduler or ema is something else.
    """
    target = device_for(model, device)
    used_scaler = grad_scaler(target.type, precision) if scaler is None else scaler
    group = AccumulationGroup()
    called = compiled(model, compile)

    def step(engine: Engine, batch: Any) -> Any:
        state = engine.state
        model.train()
        if group.begins:  # not after the optimizer's step: a user may look at gradients then
            optimizer.zero_grad()
        x, y = prepare_batch(batch, target, non_blocking)
        with autocast(target.type, precision):
            y_pred = model_transform(model_fn(called, x))
            loss, shown = total_and_shown(loss_fn(y_pred, y))
        used_scaler.scale(loss * state.weight).backward()  # type: ignore[no-untyped-call]
        if state.group_end:
            scaled_step(used_scaler, optimizer)
        group.begins = state.group_end
        return output_transform(x, y, y_pred, shown)

    trainer = Engine(
        step,
        coordinator=coordinator,
        accumulate=gradient_accumulation_steps,
        samples_in=samples_in,
        name="supervised trainer",
    )
    trainer.modules.append(model)
    trainer.add_event_handler(Events.EPOCH_STARTED, group.begin)
    save_with(trainer, model=model, optimizer=optimizer)
    if precision == "fp16":
        trainer.state.scaler = used_scaler  # type: ignore[attr-defined]
        save_with(trainer, scaler=used_scaler)
    if clip_norm is not None or clip_value is not None:
        GradientClipping(optimizer, clip_norm, max_value=clip_value).attach(trainer)
    if scheduler is not None:
        schedule_of(scheduler).attach(trainer)
    if ema is not None:
        if not isinstance(ema, EMA):
            raise ArgumentTypeError(f"ema is {ema!r}; give an allstep.EMA(model, decay)")
        ema.attach(trainer)
    return trainer


def create_supervised_evaluator(
    model: nn.Module,
    device: torch.device | str | None = None,
    non_blocking: bool = True,
    prepare_batch: PrepareBatch = prepare_batch,
    model_transform: Callable[[Any], Any] = lambda output: output,
    output_transform: Callable[[Any, Any, Any], Any] = lambda x, y, y_pred: (y_pred, y),
    *,
    precision: Precision = "no",
    compile: bool | Mapping[str, Any] = False,
    model_fn: Callable[[nn.Module, Any], Any] = lambda model, x: model(x),
    coordinator: Coordinator | None = None,
) -> Engine:
    """An engine whose step is a forward pass in evaluation mode, without gradients.

    The module inside a DDP wrapper is called, so that no collective runs in a step; a model in parts is gathered in it,
    and so evaluated on all ranks at a time. When a run starts, all ranks get
    rank 0's buffers, such as BatchNorm's statistics, unless the model is wrapped with `broadcast_buffers=False`. Ranks
    may have different amounts of data: one that runs out fires the events of the remaining iterations and does not call
    the step (`uneven="longest"`, `idle="skip"`). A run that an exception or `terminate` left is not gone on with: the
    next one is whole. To evaluate on some ranks only, give `coordinator=Alone()`. Arguments are those of
    `create_supervised_trainer`; the default output is `(y_pred, y)`.
    """
    target = device_for(model, device)
    module = unwrap(model)
    called = compiled(module, compile)

    def step(engine: Engine, batch: Any) -> Any:
        module.eval()
        with torch.no_grad():
            x, y = prepare_batch(batch, target, non_blocking)
            with autocast(target.type, precision):
                y_pred = model_transform(model_fn(called, x))
            return output_transform(x, y, y_pred)

    evaluator = Engine(
        step, coordinator=coordinator, uneven="longest", idle="skip", resumes=False, name="supervised evaluator"
    )

    @evaluator.on(Events.STARTED)
    def evaluate_one_model(engine: Engine) -> None:
        # What is in DDP is one model's already. An average of weights is not in DDP, and has each rank's statistics.
        world = World.current()
        if world is not None and _agrees_with_all(engine, world) and not _is_in_ddp(world, module):
            world.unify_buffers(module)

    return evaluator


def _agrees_with_all(engine: Engine, world: World) -> bool:
    return engine.coordinator.world_size == world.world_size > 1


def _is_in_ddp(world: World, module: nn.Module) -> bool:
    return any(unwrap(each) is module and each is not module for each in internals(world).wrapped_modules())
