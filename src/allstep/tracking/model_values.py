"""Numbers of a model and its optimizers that a `Track` records, taken without waiting for a device.

Contract: pure functions of what they are given, called on the main rank alone, so that they cross no ranks: of a module
in DDP weights and gradients are the same everywhere at the end of an accumulation group. Parameters that are sharded
over ranks have no such number on one rank, and are left out with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from allstep.parallel import is_dtensor
from allstep.tracking.values import count_values

log = logging.getLogger("allstep.tracking")


def learning_rates(optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """The rate of each parameter group: "lr", with the optimizer's name and the group's where there are several."""
    found = {}
    for name, optimizer in optimizers.items():
        prefix = "lr" if len(optimizers) == 1 else f"lr/{name}"
        groups = optimizer.param_groups
        for number, group in enumerate(groups):
            key = prefix if len(groups) == 1 else f"{prefix}/{group.get('name', number)}"
            found[key] = group["lr"]
    return found


def model_values(module: nn.Module, *, histograms: bool) -> dict[str, Any]:
    """The norms of all weights and of all gradients, and histograms of each."""
    found: dict[str, Any] = {}
    for kind, tensors in (("weights", dict(_weights(module))), ("gradients", dict(_gradients(module)))):
        if tensors:
            found[f"{kind}/norm"] = get_total_norm(list(tensors.values()))
        if histograms:
            found.update((f"{kind}/{name}", count_values(each)) for name, each in tensors.items() if each.numel())
    return found


def _weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    skipped = [name for name, each in module.named_parameters() if is_dtensor(each)]
    if skipped and id(module) not in _WARNED:
        _WARNED.add(id(module))
        log.warning("%d parameters are sharded over ranks; their weights and gradients are not recorded", len(skipped))
    yield from ((name, each.detach()) for name, each in module.named_parameters() if not is_dtensor(each))


_WARNED: set[int] = set()


def _gradients(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, each in module.named_parameters():
        if each.grad is not None and not is_dtensor(each):
            yield name, each.grad.detach()
