"""`GradientClipping`: gradients are made smaller, where they are too large, just before an optimizer steps.

Contract: attached to an engine that trains, it hooks the optimizer, whose `step` it precedes from then on: behind the
last backward pass of an accumulation group, and behind a GradScaler that unscales. DDP has averaged gradients by then,
so all ranks have the same and clip them alike, without asking each other. Where the model is in parts, each rank adds
up its own, and the ranks add up theirs in one small reduction. The norm stays on the device. What can go wrong: a norm
that is NaN or infinite makes all gradients so; `TerminateOnNan` ends such a run. An optimizer that computes gradients
in its own step, as L-BFGS does, is not clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from allstep.engine import Engine
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.parallel import clip_gradient_norm


class GradientClipping:
    """Bounds the gradients that an optimizer steps on.

    Args:
        optimizer: whose parameters; all of them have one norm together.
        max_norm: the largest norm, more than 0. Gradients with a larger one are scaled down to it.
        max_value: the largest absolute value of an element, more than 0. Give this or `max_norm`.
        norm_type: p of the p-norm; infinity for the largest element.

    Attributes:
        norm: of the gradients before the last step, a scalar tensor; None before the first, and with `max_value`.

    Raises:
        ValueError: not exactly one limit was given, or it is out of range.
        TypeError: optimizer is none.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_norm: float | None = None,
        *,
        max_value: float | None = None,
        norm_type: float = 2.0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentTypeError(f"optimizer is {optimizer!r}; give the torch optimizer whose gradients to clip")
        if (max_norm is None) == (max_value is None):
            raise ArgumentError(f"max_norm is {max_norm!r} and max_value {max_value!r}; give one of them")
        for name, value in (("max_norm", max_norm), ("max_value", max_value)):
            if value is not None and not value > 0:
                raise ArgumentError(f"{name} is {value!r}; it must be more than 0")
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.max_value = max_value
        self.norm_type = norm_type
        self.norm: torch.Tensor | None = None
        self._hook: Any = None

    def attach(self, engine: Engine) -> GradientClipping:
        """Clip what the optimizer steps on, which `engine` trains with. Returns self; a second time changes nothing."""
        if self._hook is None:
            self._hook = self.optimizer.register_step_pre_hook(self._clip)
        return self

    def detach(self) -> None:
        """Leave the optimizer's gradients alone; twice is once."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch.no_grad()
    def _clip(self, optimizer: Optimizer, *step_arguments: Any) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        gradients = [each.grad for each in parameters]
        # A GradScaler leaves it to a fused optimizer to unscale: these gradients are still so many times as large.
        scale = getattr(optimizer, "grad_scale", None)
        if self.max_value is not None:
            _clip_values(gradients, self.max_value, scale)
        elif self.max_norm is not None:
            self.norm = clip_gradient_norm(parameters, self.max_norm, self.norm_type, scale=scale)


def _clip_values(gradients: Sequence[torch.Tensor], limit: float, scale: torch.Tensor | None) -> None:
    for each in gradients:
        if scale is None:
            each.clamp_(-limit, limit)
        else:
            each.clamp_(-limit * scale, limit * scale)
