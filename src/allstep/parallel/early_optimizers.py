"""Optimizers that were made before their model was put in parts, and would train nothing.

Contract: putting a model in parts makes new parameters. `World.wrap` calls `watch_replaced` behind that, with what the
model had before. Where something still holds one of the old parameters, the first step of an optimizer that has it
raises; else the model would stay as it is, and nobody would say so. Where nothing holds any, as in a script that makes
its optimizer behind the wrap, nothing is watched and no step costs more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from allstep.errors import ParallelError

ReplacedParameters = Mapping[int, tuple[str, "ref[nn.Parameter]"]]
"""Parameters by their `id`: their names, and what does not keep them."""


def parameters_before(module: nn.Module) -> ReplacedParameters:
    """What a wrap may put other parameters in the place of."""
    return {id(each): (name, ref(each)) for name, each in module.named_parameters()}


def watch_replaced(before: ReplacedParameters, now: Iterable[nn.Parameter]) -> RemovableHandle | None:
    """Have steps of optimizers over parameters that a model no longer has raise, until the handle is removed.

    Args:
        before: the model's parameters before it was wrapped.
        now: those that it has.

    Returns:
        None where nothing holds a parameter that was replaced.
    """
    stays = set(map(id, now))
    left = {at: (name, held) for at, (name, held) in before.items() if at not in stays and held() is not None}
    if not left:
        return None

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for each in (one for group in optimizer.param_groups for one in group["params"]):
            name, held = left.get(id(each), ("", None))
            if held is not None and held() is each:
                kind = type(optimizer).__name__
                raise ParallelError(
                    f"this {kind} was made before world.wrap put the model in parts: it steps {name} as it was then, "
                    f"and would train nothing. Make it from what wrap returns: torch.optim.{kind}(model.parameters())"
                )

    return register_optimizer_step_pre_hook(check)
