"""Activations that are computed anew in the backward pass instead of being kept, by units of a model.

Contract: `recompute_activations` has each unit's forward pass keep its inputs alone. The backward pass runs it once
more, with the generators of random numbers and the autocast of the first time, so that dropout is the same and so are
gradients. The units stay the same objects with the same names. What is around `forward`, such as hooks, runs once, so
`fully_shard` gathers a unit before its second pass as before its first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from allstep.errors import ArgumentError
from allstep.parallel.units import Units, every, fitting


def units_to_checkpoint(module: nn.Module, which: Any, units: Units = None) -> list[nn.Module]:
    """The units of a module that compute their activations anew in the backward pass; none for None.

    Args:
        module: what is trained.
        which: classes of the units, or a predicate on a submodule; or a number n for every n-th of `units`.
        units: what n counts; by default units chosen by size.

    Raises:
        ArgumentError, ParallelError: it names no submodule, or is none of what it may be.
    """
    if which is None:
        return []
    if isinstance(which, int):
        if isinstance(which, bool) or which < 1:
            raise ArgumentError(
                f"checkpoint_activations is {which!r}; give classes of modules, a function of one, or a number n from "
                "1 for every n-th unit"
            )
        return every(module, which, units)
    return fitting(module, which, "checkpoint_activations")


def recompute_activations(units: Iterable[nn.Module]) -> None:
    """Have each of these modules compute its activations anew in the backward pass; one that does already stays."""
    for each in units:
        replaced = vars(each).get("forward")
        if not isinstance(replaced, _Checkpointed):
            each.forward = _Checkpointed(each, replaced)


class _Checkpointed:
    """The forward pass of one unit; in an object of its own, so that copies of the unit call their own."""

    def __init__(self, unit: nn.Module, replaced: Callable[..., Any] | None) -> None:
        self._unit = unit
        self._replaced = replaced  # a forward that the unit had besides its class's

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        unit = self._unit
        function, given = (type(unit).forward, (unit, *inputs)) if self._replaced is None else (self._replaced, inputs)
        if not torch.is_grad_enabled():
            return function(*given, **options)
        return checkpoint(function, *given, use_reentrant=False, **options)
