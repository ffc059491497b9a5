"""Units of a model: the submodules that are gathered, computed anew or compiled in one piece each, such as its blocks.

Contract: they are named by classes or by a predicate on a submodule, or, where nothing is said, chosen by size:
`choose_units` then takes the outermost submodules with 1 to 25 % of the elements each. For sharding, a submodule that
several units use becomes a unit of its own. A parameter that several submodules hold (tied weights) stays with the
whole module, and so do units with a part of it: else each of its holders would go on with a tensor of its own. What is
inside of torch's own attention is no unit, since that computes with its layers' parameters and does not call them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from allstep.errors import ArgumentError, ParallelError

log = logging.getLogger("allstep.parallel")

Units = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool] | None
"""What says which submodules are units: classes, a predicate, or None for a choice by size."""

_SMALLEST_UNIT, _LARGEST_UNIT = 0.01, 0.25  # of the module's elements
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that have no forward pass."""

_IN_ONE_PIECE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that compute with the parameters of what is in them, and do not call it, always or in evaluation."""


def choose_units(module: nn.Module, units: Units) -> list[nn.Module]:
    """The submodules that are gathered in one piece each, the innermost first; the module itself is none of them.

    Raises:
        ParallelError: classes or a predicate that no submodule fits.
        ArgumentError: units is none of what it may be.
    """
    chosen = _by_size(module) if units is None else [each for each in fitting(module, units) if each is not module]
    held = {
        inner: type(outer).__name__
        for outer in module.modules()
        if isinstance(outer, _IN_ONE_PIECE)
        for inner in outer.modules()
        if inner is not outer
    }
    for each in chosen:
        if each in held:
            log.info("%s in a %s is no unit, since that computes with its parameters", type(each).__name__, held[each])
    return _without_split_ties(module, _with_shared(module, [each for each in chosen if each not in held]))


def fitting(module: nn.Module, said: Any, option: str = "units") -> list[nn.Module]:
    """The submodules that classes or a predicate name, the module itself among them, in its order.

    Raises:
        ParallelError: no submodule fits, or one that has no forward pass.
        ArgumentError: it is neither classes nor a predicate.
    """
    chosen = [each for each in module.modules() if _fits(each, said, option)]
    if not chosen:
        classes = sorted({type(each).__name__ for each in module.modules()})
        raise ParallelError(f"{option} is {said!r}, which no submodule fits; the module has {', '.join(classes)}")
    if bad := next((each for each in chosen if isinstance(each, CONTAINERS)), None):
        raise ParallelError(
            f"{option} has {type(bad).__name__}, which has no forward pass of its own; name the class of what is in it"
        )
    return chosen


def _fits(module: nn.Module, said: Any, option: str) -> bool:
    if isinstance(said, type) or (isinstance(said, tuple) and all(isinstance(each, type) for each in said)):
        return isinstance(module, said)
    if not callable(said):
        raise ArgumentError(f"{option} is {said!r}; give a class of modules, several in a tuple, or a function of one")
    return bool(said(module))


def every(module: nn.Module, nth: int, units: Units) -> list[nn.Module]:
    """Every n-th of a module's outermost units, in its order; all for 1."""
    chosen = set(choose_units(module, units))
    inside = {inner for each in chosen for inner in each.modules() if inner is not each}
    return [each for each in module.modules() if each in chosen and each not in inside][nth - 1 :: nth]


def _by_size(module: nn.Module) -> list[nn.Module]:
    total = sum(each.numel() for each in module.parameters())
    found: dict[nn.Module, None] = {}

    def descend(outer: nn.Module) -> None:
        for each in outer.children():
            share = sum(one.numel() for one in each.parameters()) / max(total, 1)
            is_large = (share > _LARGEST_UNIT and not isinstance(each, _IN_ONE_PIECE)) or isinstance(each, CONTAINERS)
            if share < _SMALLEST_UNIT:
                continue
            before = len(found)
            if is_large:
                descend(each)
            # What cannot be divided is gathered in one piece, however large.
            if not isinstance(each, CONTAINERS) and (not is_large or len(found) == before):
                found[each] = None

    descend(module)
    return [each for each in module.modules() if each in found]


def _with_shared(module: nn.Module, chosen: list[nn.Module]) -> list[nn.Module]:
    """The units and what several of them use, innermost first."""
    outermost = [unit for unit in chosen if not any(unit in other.modules() for other in chosen if other is not unit)]
    users: dict[nn.Module, int] = {}
    for unit in outermost:
        for each in unit.modules():
            users[each] = users.get(each, 0) + 1
    shared = {each for each, count in users.items() if count > 1 and next(each.parameters(), None) is not None}
    inside = {inner for each in shared for inner in each.modules() if inner is not each}
    units = {*chosen, *(each for each in shared - inside if not isinstance(each, CONTAINERS))}
    found = [each for each in module.modules() if each in units and each is not module][::-1]
    return sorted(found, key=lambda each: sum(1 for _ in each.modules()))  # what is inside of another has fewer


def _without_split_ties(module: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """The units without those that hold a part of what is tied to something outside of them."""
    holders: dict[int, list[nn.Module]] = {}
    for each in module.modules():
        for parameter in dict.fromkeys(each.parameters(recurse=False)):
            holders.setdefault(id(parameter), []).append(each)
    ties = [of for of in holders.values() if len(of) > 1]
    kept = []
    for unit in units:
        inside = set(unit.modules())
        if any(0 < sum(each in inside for each in of) < len(of) for of in ties):
            log.info("%s has a weight that is tied to one outside of it, so it is no unit", type(unit).__name__)
        else:
            kept.append(unit)
    return kept
