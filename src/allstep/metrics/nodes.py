"""What holds states in a tree of metrics, collections, wrappers and arithmetic, and which of them hold the same.

Contract: `MetricSet` is the record that everything else in this package works on. It is made once, from metrics that
have taken nothing in, and says by name which metrics hold states (`nodes`), which do not but may keep something beside
states (`stateless`), and which members of a collection always hold what another one holds (`leaders`), so that these
are fed once and travel once. A `MetricNode` remembers how its metric began.

Who shares states is decided by how metrics were made, never by what they have seen. torchmetrics forms its compute
groups by comparing states after the first batch: a rank without a batch has none then, ranks could differ, and members
that agree on one batch by chance would stay together. So the groups are formed here and put in the place of the
collection's own (`apply_compute_groups`). Ranks compare them with everything else when a run begins.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.metric import CompositionalMetric
from torchmetrics.wrappers.abstract import WrapperMetric

from allstep.metrics.torchmetrics_private import (
    COMPUTE_ONLY_METHODS,
    asked_groups,
    bookkeeping,
    is_library_class,
    set_compute_groups,
    state_defaults,
    state_reductions,
    write_count,
)

Entry: TypeAlias = Metric | MetricCollection

_PLAIN_TYPES = (bool, int, float, str, bytes, type(None), torch.dtype)
_MISSING = object()

# What of a class that differs between two metrics leaves alone what their common `update` does.
_BESIDE_UPDATE = COMPUTE_ONLY_METHODS | frozenset(
    {
        *("compute", "plot", "is_differentiable", "higher_is_better", "full_state_update"),
        *("plot_lower_bound", "plot_upper_bound", "plot_legend_name"),
        *("__module__", "__qualname__", "__doc__", "__init__", "__annotations__", "__annotate__", "__annotate_func__"),
        *("__annotations_cache__", "__static_attributes__", "__firstlineno__", "__abstractmethods__", "_abc_impl"),
        *("__dict__", "__weakref__", "__jit_unused_properties__"),
    }
)
_CHECKS_ONLY = frozenset({"validate_args"})  # torchmetrics' flag: whether input is checked, not what is kept of it


@dataclass(frozen=True, slots=True, eq=False)
class MetricNode:
    """A metric inside of what was given, and how it was when it had taken nothing in.

    Attributes:
        name: its path, such as "f1.metric_a".
        metric: the metric.
        defaults: its own states and what `reset` sets them to; none where it only shows states of what it wraps.
        reductions: by state, how ranks reduce it.
        initial_values: plain attributes (numbers, texts, types) beside the states.
        initial_tensors: tensors beside the states, each with how often it had been written to.
        apart: attributes that are states or torchmetrics' own.
    """

    name: str
    metric: Metric
    defaults: Mapping[str, torch.Tensor | list[Any]] = field(default_factory=dict)
    reductions: Mapping[str, Any] = field(default_factory=dict)
    initial_values: Mapping[str, Any] = field(default_factory=dict)
    initial_tensors: Mapping[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()

    @property
    def updates(self) -> int:
        """Batches that it has taken in."""
        return int(self.metric.update_count)

    def changed_values(self) -> dict[str, Any]:
        """Plain attributes beside the states that updates have set, which a rank without a batch lacks."""
        values = plain_attributes(self.metric, self.apart)
        return {name: value for name, value in values.items() if not self._began_with(name, value)}

    def changed_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors beside the states that were set or written to since the metric was made."""
        return {
            name: tensor
            for name, (tensor, writes) in _tensor_attributes(self.metric, self.apart).items()
            if name not in self.initial_tensors
            or self.initial_tensors[name][0] is not tensor
            or self.initial_tensors[name][1] != writes
        }

    def counts_outside_states(self) -> list[str]:
        """Attributes in which a user's own metric seems to count beside its states, so that no rank adds them up.

        These are numbers that began as other numbers, and tensors.
        """
        if is_library_class(type(self.metric)) or isinstance(self.metric, WrapperMetric):
            return []
        numbers = [
            name
            for name, value in self.changed_values().items()
            if _is_number(value) and _is_number(self.initial_values.get(name))
        ]
        return [*numbers, *(name for name in self.changed_tensors() if name in self.initial_tensors)]

    def restore_attributes(self) -> None:
        """Give attributes beside the states the values that they were made with."""
        attributes = vars(self.metric)
        for name in self.changed_values():
            if name in self.initial_values:
                attributes[name] = self.initial_values[name]
            else:
                del attributes[name]
        changed = self.changed_tensors()
        attributes.update({name: self.initial_tensors[name][0] for name in changed if name in self.initial_tensors})

    def _began_with(self, name: str, value: Any) -> bool:
        initial = self.initial_values.get(name, _MISSING)
        return bool(initial is value or (type(initial) is type(value) and initial == value))


@dataclass(slots=True, eq=False)
class MetricSet:
    """Metrics that are fed and reset together, taken apart; made by `metric_set`.

    Attributes:
        entries: what the user gave, by name.
        names_results: whether the names are part of the results' names; not where one collection was given alone.
        nodes: metrics that hold states, those inside of others too, each once.
        stateless: all others but arithmetic.
        leaders: for a metric whose states another one holds too, that one, by the metric's id.
        compared: name and text of what ranks compare beside the states: how metrics were made, and when they are fed.
        unmerged: by a metric's id and a state, what loaded states brought along that only a reduction can join.
    """

    entries: dict[str, Entry]
    names_results: bool
    nodes: list[MetricNode]
    stateless: list[MetricNode]
    leaders: dict[int, Metric]
    compared: list[tuple[str, str]] = field(default_factory=list)
    unmerged: dict[tuple[int, str], list[Any]] = field(default_factory=dict)


def metric_set(entries: Mapping[str, Entry], *, names_results: bool = True) -> MetricSet:
    """Take named metrics and collections apart."""
    every = [
        _node(name, metric) for name, metric in named_metrics(entries) if not isinstance(metric, CompositionalMetric)
    ]
    return MetricSet(
        dict(entries),
        names_results,
        [node for node in every if node.defaults],
        [node for node in every if not node.defaults],
        leaders_of(entries.values()),
    )


def named_metrics(entries: Mapping[str, Entry]) -> list[tuple[str, Metric]]:
    """Every metric inside of named entries, with the first of its names."""
    found: dict[int, tuple[str, Metric]] = {}
    for name, entry in entries.items():
        for path, module in entry.named_modules():
            if isinstance(module, Metric):
                # A metric may have several names, as in `p * r / (p + r)`; errors and saving use the first.
                found.setdefault(id(module), (f"{name}.{path}" if path else name, module))
    return list(found.values())


def wrapped_metrics(module: nn.Module) -> Iterator[Metric]:
    """The metrics that a wrapper, a collection or arithmetic holds, but not what those hold."""
    for child in module.children():
        if isinstance(child, Metric):
            yield child
        else:
            yield from wrapped_metrics(child)


def collections_in(entries: Iterable[Entry]) -> Iterator[MetricCollection]:
    """Every collection inside."""
    for entry in entries:
        for module in entry.modules():
            if isinstance(module, MetricCollection):
                yield module


def members_of(collection: MetricCollection) -> dict[str, Metric]:
    """A collection's members by name, without prefix and postfix."""
    return {str(name): member for name, member in collection.items(keep_base=True, copy_state=False)}


def plain_attributes(metric: Metric, apart: frozenset[str]) -> dict[str, Any]:
    """A metric's numbers, texts and types among its attributes, but for those named."""
    return {
        name: value for name, value in vars(metric).items() if name not in apart and isinstance(value, _PLAIN_TYPES)
    }


def _node(name: str, metric: Metric) -> MetricNode:
    defaults = state_defaults(metric)
    if any(_shows_states_of(metric, inner) for inner in wrapped_metrics(metric)):
        # Its states are those of the inner metric: packed twice they would be reduced twice.
        defaults = {}
    apart = bookkeeping().union(defaults)
    return MetricNode(
        name,
        metric,
        defaults,
        state_reductions(metric) if defaults else {},
        plain_attributes(metric, apart),
        _tensor_attributes(metric, apart),
        apart,
    )


def _shows_states_of(metric: Metric, inner: Metric) -> bool:
    """Whether a wrapper has no states but those of what it wraps, as `ClasswiseWrapper`."""
    shown, held = metric.metric_state, inner.metric_state
    return any(value is held.get(name) for name, value in shown.items())


def _tensor_attributes(metric: Metric, apart: frozenset[str]) -> dict[str, tuple[torch.Tensor, int]]:
    return {
        name: (value, write_count(value))
        for name, value in vars(metric).items()
        if name not in apart and isinstance(value, torch.Tensor)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Who shares states


def leaders_of(entries: Iterable[Entry]) -> dict[int, Metric]:
    """For members of collections whose states another metric holds too: that one, which leads itself, by their id.

    A metric may be in several collections, and behind another one in each.
    """
    found: dict[int, Metric] = {}

    def leader_of(metric: Metric) -> Metric:
        while id(metric) in found:
            metric = found[id(metric)]
        return metric

    for collection in collections_in(entries):
        for leader, *others in compute_groups(collection):
            for other in others:
                # Groups of several collections may overlap, and lead to one that is behind another one itself.
                one, behind = leader_of(leader), leader_of(other)
                if one is not behind:
                    found[id(behind)] = one
    return {metric: leader_of(leader) for metric, leader in found.items()}


def compute_groups(collection: MetricCollection) -> list[list[Metric]]:
    """Members of a collection that always hold the same states, each once, the first of a group to be fed.

    Groups that a user gave hold as given; with `compute_groups=False` there are none.
    """
    members, asked = members_of(collection), asked_groups(collection)
    # The user's own word holds, also where the members' making does not show it.
    if not isinstance(asked, bool):
        return [[members[name] for name in names] for names in asked]
    groups: list[list[Metric]] = []
    for member in {id(member): member for member in members.values()}.values() if asked else ():
        group = next((known for known in groups if update_alike(known[0], member)), None)
        if group is None:
            groups.append([member])
        else:
            group.append(member)
    return groups


def apply_compute_groups(collection: MetricCollection, leaders: Mapping[int, Metric]) -> None:
    """Have a collection share states as `leaders` says, instead of as its members' first batches happen to agree.

    What its members hold stays. After it, reading a member by hand shows what its leader was fed.
    """
    if asked_groups(collection) is False:
        return
    members = members_of(collection)
    groups: dict[int, list[str]] = {}
    for name, member in members.items():
        groups.setdefault(id(leaders.get(id(member), member)), []).append(name)
    for leader, names in groups.items():  # the first of a group is the one that is fed, where it is in this collection
        names.sort(key=lambda name: id(members[name]) != leader)
    # torchmetrics' own reads, resets and copies of members then follow the groups that are fed and travel here.
    set_compute_groups(collection, list(groups.values()))


def update_alike(one: Metric, other: Metric) -> bool:
    """Whether two metrics that are given the same batches hold the same states, as far as their making shows.

    They do when one class defines the `update` of both, the states begin and reduce alike, and nothing differs that
    this `update` could read: no method that a subclass overrides, and no attribute. Of torchmetrics' own classes it is
    known that a base class does not read what only a subclass is given, such as the `beta` of an F-score.
    """
    update = getattr(type(one), "update", None)
    if update is not getattr(type(other), "update", None) or not isinstance(update, FunctionType):
        return False
    defaults = state_defaults(one)
    if not defaults or not _equal(defaults, state_defaults(other)) or state_reductions(one) != state_reductions(other):
        return False
    # A method that one of them overrides may be called by the common `update`, and keep something else.
    differing = set(type(one).__mro__) ^ set(type(other).__mro__)
    overridden = {name for kind in differing for name in vars(kind)} - _BESIDE_UPDATE
    if any(getattr(type(one), name, None) is not getattr(type(other), name, None) for name in overridden):
        return False
    apart = bookkeeping() | defaults.keys() | _CHECKS_ONLY | _given_to_subclasses(type(one), type(other))
    return _equal(_made_of(one, apart), _made_of(other, apart))


def _made_of(metric: Metric, apart: frozenset[str]) -> dict[str, Any]:
    """All that an update can find in a metric, but what is named."""
    # Thresholds are buffers, and extractors are modules, which torch keeps apart from other attributes.
    registered = {**dict(metric.named_buffers()), **dict(metric.named_parameters()), **dict(metric.named_children())}
    return {**{name: value for name, value in vars(metric).items() if name not in apart}, **registered}


def _given_to_subclasses(*kinds: type[Metric]) -> frozenset[str]:
    """Arguments of torchmetrics' classes that the class whose `update` they inherit does not know."""
    names: frozenset[str] = frozenset()
    for kind in kinds:
        if is_library_class(kind):
            lineage = list(kind.__mro__)
            definer = next(at for at, each in enumerate(lineage) if "update" in vars(each))
            names |= _arguments(lineage[:definer]) - _arguments(lineage[definer:])
    return names


def _arguments(kinds: Iterable[type]) -> frozenset[str]:
    return frozenset(name for kind in kinds for name in init_arguments(kind))


@cache
def init_arguments(kind: type) -> tuple[str, ...]:
    """The named arguments that a class itself is made with, those of its bases left out."""
    made = vars(kind).get("__init__")
    if not isinstance(made, FunctionType):
        return ()
    parameters = list(inspect.signature(made).parameters.values())[1:]
    return tuple(each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY))


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same for sure; those of unknown types are not."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    # Equal numbers of different types would reduce to different results.
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, set | frozenset):
        return bool(one == other)
    return isinstance(one, bool | int | float | str | bytes | torch.dtype | torch.device) and one == other
