"""Which metrics of a collection always hold the same states, so that these travel once.

Contract: a pure function of how the metrics were made, never of what they have seen: torchmetrics forms its compute
groups by comparing states after the first batch, so that a rank without a batch has none, and ranks could differ. Here
two metrics share when they run the same `update`, everything that it reads of them is equal, and their states begin
alike. What torchmetrics' updates read is read off their code; a user's `update` may hand its metric to any function, so
that all that two such metrics are made of has to be equal. A metric that reduces itself shares with none. Groups that a
user gave a collection hold as given, and `compute_groups=False` shares nothing. `fix_groups` puts these groups in the
place of torchmetrics' own. Metrics outside of collections share nothing either: whoever gives them apart may update,
read or reset one by hand, so each has to hold what it counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection

from allstep.metrics.torchmetrics_private import BOOKKEEPING, WRAPPED, is_known, syncs_itself

# What of a class that differs leaves what its `update` does alone.
_BESIDE_UPDATE = frozenset(
    {
        *("compute", "plot", "is_differentiable", "higher_is_better", "full_state_update"),
        *("plot_lower_bound", "plot_upper_bound", "plot_legend_name"),
        *("__module__", "__qualname__", "__doc__", "__init__", "__annotations__", "__annotate__", "__annotate_func__"),
        *("__annotations_cache__", "__static_attributes__", "__firstlineno__", "__abstractmethods__", "_abc_impl"),
        *("__dict__", "__weakref__", "__jit_unused_properties__"),
    }
)
_CHECKS_ONLY = frozenset({"validate_args"})  # torchmetrics' flag: whether input is checked, not what is kept of it
_READS_ANYTHING = frozenset({"getattr", "vars", "__dict__", "eval", "exec", "super"})


def shared_states(collection: MetricCollection) -> dict[int, Metric]:
    """The metric that speaks for each member of a collection, by the member's id; those not listed speak themselves."""
    members: dict[str, Metric] = dict(collection._modules)
    asked = collection._enable_compute_groups
    if not asked:
        return {}
    if isinstance(asked, list):
        groups = [[members[name] for name in names] for names in asked]
    else:
        groups = []
        for member in {id(member): member for member in members.values()}.values():
            group = next((known for known in groups if update_alike(known[0], member)), None)
            groups.append([member]) if group is None else group.append(member)
    groups = [[member for member in group if not syncs_itself(member)] for group in groups]
    return {id(follower): group[0] for group in groups for follower in group[1:]}


def fix_groups(collection: MetricCollection, following: Mapping[int, Metric]) -> None:
    """Have a collection share states as `shared_states` said, instead of as its members' first batches happen to agree.

    What its members hold stays.
    """
    if not collection._enable_compute_groups:
        return
    groups: dict[int, list[str]] = {}
    for name, member in collection._modules.items():
        groups.setdefault(id(following.get(id(member), member)), []).append(name)
    for leader, names in groups.items():  # the first of a group is the one that is fed, where it is in this collection
        names.sort(key=lambda name: id(collection._modules[name]) != leader)
    collection._compute_groups_create_state_ref(copy=True)  # members of groups so far share tensors
    collection._groups = dict(enumerate(groups.values()))
    collection._groups_checked = True
    collection._state_is_copy = False


def update_alike(one: Metric, other: Metric) -> bool:
    """Whether two metrics that are given the same batches hold the same states."""
    function = getattr(type(one), "update", None)
    if function is not getattr(type(other), "update", None) or not isinstance(function, FunctionType):
        return False
    if not one._defaults or one._reductions != other._reductions or not _equal(one._defaults, other._defaults):
        return False
    names = _read_by(type(one), function)
    other_names = _read_by(type(other), function)
    if names is None or names != other_names:
        return False
    data = {name for name in names if not isinstance(getattr(type(one), name, None), FunctionType)}
    methods = names - data
    if any(getattr(type(one), name) is not getattr(type(other), name, None) for name in methods):
        return False
    if not all(_is_known(code) for code in (function, *(getattr(type(one), name) for name in methods))):
        return _made_alike(one, other)
    held = [
        name for name in data - _CHECKS_ONLY if name not in one._defaults and hasattr(one, name) | hasattr(other, name)
    ]
    return all(_equal(getattr(one, name, None), getattr(other, name, None)) for name in held)


def _is_known(function: FunctionType) -> bool:
    """Whether all that a function reads of its metric is in its code: no wrapper, and none of a user's."""
    return is_known(function.__module__) and not hasattr(function, "__wrapped__")


def _made_alike(one: Metric, other: Metric) -> bool:
    """Whether metrics differ in nothing but how they compute: whatever an update reads of them, it finds the same."""
    differing = set(type(one).__mro__) ^ set(type(other).__mro__)
    names = {name for kind in differing for name in vars(kind)} - _BESIDE_UPDATE
    if any(getattr(type(one), name, None) is not getattr(type(other), name, None) for name in names):
        return False
    apart = {*BOOKKEEPING, *WRAPPED, *one._defaults}
    return _equal(*({name: value for name, value in vars(each).items() if name not in apart} for each in (one, other)))


def _read_by(owner: type, function: FunctionType) -> frozenset[str] | None:
    """Names that a method, and the methods that it calls, may read of its metric; None when it may read anything."""
    names: set[str] = set()
    waiting: list[FunctionType] = [function]
    while waiting:
        for name in _names(waiting.pop().__code__):
            if name in _READS_ANYTHING:
                return None
            if name not in names:
                names.add(name)
                found = getattr(owner, name, None)
                if isinstance(found, FunctionType):
                    waiting.append(found)
    return frozenset(names)


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, set | frozenset):
        return bool(one == other)
    if isinstance(one, torch.nn.Module) or not hasattr(one, "__eq__"):
        return False
    return isinstance(one, bool | int | float | str | bytes | torch.dtype | torch.device) and one == other
