"""A ready engine for recurrent networks: backpropagation through time that is truncated after some steps of time.

After Williams and Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network Trajectories",
1990.

Contract: a batch is cut along time into pieces. Each piece is a forward pass that begins with the state in which the
last one ended, a backward pass that ends where the piece begins, and an optimizer step. An iteration is one batch, so
it has several optimizer steps, and OPTIMIZER_STEP_COMPLETED is fired once, behind the last of them. The state does not
go on into the next batch. What can go wrong: ranks whose batches have different numbers of pieces would make different
numbers of backward passes, which is an error on all of them; give all sequences of an iteration one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from allstep.coordination import Coordinator
from allstep.engine import Engine
from allstep.engine.events import check_count
from allstep.errors import DataError
from allstep.handlers import EMA, GradientClipping, Schedule
from allstep.parallel import Precision, autocast, grad_scaler
from allstep.trainers.step_parts import compiled, device_for, save_with, scaled_step, schedule_of
from allstep.trainers.supervised import PrepareBatch, prepare_batch
from allstep.world.move import rebuilt


def create_recurrent_trainer(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    steps_of_time: int,
    *,
    time_dim: int = 1,
    device: torch.device | str | None = None,
    non_blocking: bool = True,
    prepare_batch: PrepareBatch = prepare_batch,
    precision: Precision = "no",
    clip_norm: float | None = None,
    scheduler: Schedule | LRScheduler | None = None,
    ema: EMA | None = None,
    compile: bool | Mapping[str, Any] = False,
    samples_in: Callable[[Any], int] | None = None,
    model_fn: Callable[[nn.Module, Any, Any], tuple[Any, Any]] = lambda model, x, state: model(x, state),
    coordinator: Coordinator | None = None,
) -> Engine:
    """An engine that trains a recurrent model by truncated backpropagation through time.

    Its output is the mean loss over the batch's time, detached and unweighted.

    Args:
        model: called as `model(x, state)`, with None as the first state of a batch; returns (y_pred, state). Wrapped or
            not.
        optimizer: its optimizer.
        loss_fn: `(y_pred, y) -> loss`, a scalar tensor, mean over samples and time.
        steps_of_time: in a piece, 1 or more. The last piece of a batch may be shorter.
        time_dim: the dimension of x and y that is time: 1 for (N, T, ...), 0 for (T, N, ...).
        device: where batches go; by default the current world's device, else the model's.
        non_blocking: copy from pinned memory without waiting.
        prepare_batch: `(batch, device, non_blocking) -> (x, y)`, two tensors.
        precision: "no", "fp16" or "bf16", as in `create_supervised_trainer`.
        clip_norm: the largest norm of the gradients of a step.
        scheduler: steps once a batch; as in `create_supervised_trainer`.
        ema: updated once a batch; made but not attached.
        compile: have `torch.compile` compile the model, with these options where it is a mapping.
        samples_in: `batch -> int`, how many samples a batch has; by default rows. With time as the first dimension it
            is to be given, since rows are steps of time then.
        model_fn: `(model, x, state) -> (y_pred, state)`.
        coordinator: how ranks agree; by default the current world's.

    Raises:
        ArgumentError: steps_of_time or clip_norm is out of range.
        ParallelError: an unknown precision.
    """
    check_count("steps_of_time", steps_of_time, 1)
    target = device_for(model, device)
    scaler = grad_scaler(target.type, precision)
    called = compiled(model, compile)

    def step(engine: Engine, batch: Any) -> torch.Tensor:
        model.train()
        x, y = prepare_batch(batch, target, non_blocking)
        length = x.shape[time_dim]
        if not length or y.shape[time_dim] != length:
            raise DataError(
                f"x has the shape {tuple(x.shape)} and y {tuple(y.shape)}, which are to have the same length of time, "
                f"more than 0, in dimension {time_dim}; see time_dim"
            )
        state: Any = None
        losses = []
        for piece, target_piece in zip(x.split(steps_of_time, time_dim), y.split(steps_of_time, time_dim), strict=True):
            optimizer.zero_grad()
            with autocast(target.type, precision):
                y_pred, state = model_fn(called, piece, state)
                loss = loss_fn(y_pred, target_piece)
            scaler.scale(loss * engine.state.weight).backward()  # type: ignore[no-untyped-call]
            scaled_step(scaler, optimizer)
            state = rebuilt(state, _detached)
            losses.append(loss.detach() * (piece.shape[time_dim] / length))
        return torch.stack(losses).sum()

    trainer = Engine(step, coordinator=coordinator, samples_in=samples_in, name="recurrent trainer")
    trainer.modules.append(model)
    save_with(trainer, model=model, optimizer=optimizer)
    if precision == "fp16":
        save_with(trainer, scaler=scaler)
    if clip_norm is not None:
        GradientClipping(optimizer, clip_norm).attach(trainer)
    if scheduler is not None:
        schedule_of(scheduler).attach(trainer)
    if ema is not None:
        ema.attach(trainer)
    return trainer


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
