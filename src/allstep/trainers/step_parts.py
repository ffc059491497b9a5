"""What the steps of ready trainers are made of: losses, scaled optimizer steps, accumulation, compiling, devices.

Contract: small functions without a state of their own, but for `AccumulationGroup`. None of them crosses ranks or waits
for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from allstep.engine import Engine
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.handlers import Schedule
from allstep.world import World


class AccumulationGroup:
    """Whether the next iteration begins an accumulation group. Groups never cross epochs."""

    begins = True

    def begin(self) -> None:
        """An epoch starts."""
        self.begins = True


def total_and_shown(loss: Any) -> tuple[torch.Tensor, Any]:
    """What is to be trained, and what is shown of it: detached, and by name where there are several parts.

    Raises:
        ArgumentError: there is no part, or one of several has the name of their sum.
    """
    if not isinstance(loss, Mapping):
        return loss, loss.detach()
    if not loss or ("loss" in loss and len(loss) > 1):
        raise ArgumentError(
            f"the loss is a mapping of {', '.join(map(repr, loss)) or 'nothing'}; give tensors by names other than "
            "'loss', which is their sum"
        )
    total = reduce(add, loss.values())
    return total, {**{name: part.detach() for name, part in loss.items()}, "loss": total.detach()}


def scaled_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer's step on scaled gradients; the scaler can be used again where it raises."""
    try:
        scaler.step(optimizer)
    except BaseException:
        # The scaler noted that it had unscaled these gradients, and would take the next ones for unscaled too.
        with suppress(AssertionError):  # it had not begun
            scaler.update()
        raise
    scaler.update()


def save_with(trainer: Engine, **objects: Any) -> None:
    """Have the trainer's checkpoint save objects, by these names."""
    for name, each in objects.items():
        trainer.extension.add_state(each, name)


def schedule_of(scheduler: Any) -> Schedule:
    """A schedule of what was given. Raises ArgumentTypeError where it is none."""
    if isinstance(scheduler, Schedule):
        return scheduler
    if not isinstance(scheduler, LRScheduler):
        raise ArgumentTypeError(f"scheduler is {scheduler!r}; give a scheduler of torch or an allstep.Schedule")
    return Schedule(scheduler)


def compiled(module: nn.Module, how: bool | Mapping[str, Any]) -> nn.Module:
    """What is called in a step in place of `module`: itself, or compiled by torch."""
    if how is False:
        return module
    return torch.compile(module, **({} if how is True else how))  # type: ignore[return-value]


def device_for(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where a model's batches go."""
    if device is not None:
        return torch.device(device)
    world = World.current()
    if world is not None:
        return world.device
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
