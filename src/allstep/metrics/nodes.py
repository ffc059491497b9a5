"""What of a metric holds states: metrics may be collections, wrappers and arithmetic on others.

Contract: pure functions over metrics as they were made. `nodes` are all metrics inside that hold states of their own,
by name; `stateless` are all others but arithmetic, which may still keep something beside states. A `Node` remembers how
its metric began, so it is made once, before the metric has taken anything in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.metric import CompositionalMetric
from torchmetrics.wrappers.abstract import WrapperMetric

from allstep.metrics.sharing import shared_states
from allstep.metrics.torchmetrics_private import BOOKKEEPING, is_known

Entry: TypeAlias = Metric | MetricCollection

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype)
_MISSING = object()


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A metric. `began` has the plain attributes that it was made with, `tensors` those tensors that are no states."""

    name: str
    metric: Metric
    began: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, tuple[torch.Tensor, int]] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Batches that it has taken in."""
        return int(self.metric._update_count)

    @property
    def states(self) -> Mapping[str, Any]:
        """The states that it holds itself, and how they begin."""
        return self.metric._defaults if _holds_states(self.metric) else {}

    def learnt(self) -> dict[str, Any]:
        """Plain attributes beside the states that updates have set, which a rank without a batch lacks."""
        return {
            name: value for name, value in plain_attributes(self.metric).items() if not self._began_with(name, value)
        }

    def tensors_changed(self) -> dict[str, torch.Tensor]:
        """Tensors beside the states that were set or written to since the metric was made."""
        return {
            name: tensor
            for name, (tensor, version) in _tensor_attributes(self.metric).items()
            if name not in self.tensors or self.tensors[name][0] is not tensor or self.tensors[name][1] != version
        }

    def counted(self) -> list[str]:
        """Attributes in which a user's own metric seems to count outside of its states, so that no rank adds them up.

        These are numbers that began as other numbers, and tensors.
        """
        if is_known(type(self.metric).__module__) or isinstance(self.metric, WrapperMetric):
            return []
        numbers = [name for name, value in self.learnt().items() if _is_number(value) and _is_number(self._start(name))]
        return [*numbers, *(name for name in self.tensors_changed() if name in self.tensors)]

    def begin_again(self) -> None:
        """Give attributes beside the states the values that they were made with."""
        held = vars(self.metric)
        for name in self.learnt():
            if name in self.began:
                held[name] = self.began[name]
            else:
                del held[name]
        held.update({name: self.tensors[name][0] for name in self.tensors_changed() if name in self.tensors})

    def _start(self, name: str) -> Any:
        return self.began.get(name, _MISSING)

    def _began_with(self, name: str, value: Any) -> bool:
        before = self._start(name)
        return bool(before is value or (type(before) is type(value) and before == value))


def nodes(entries: Mapping[str, Entry]) -> list[Node]:
    """All metrics with states inside of named entries, without repetition."""
    return [_node(name, metric) for name, metric in named_metrics(entries) if _holds_states(metric)]


def stateless(entries: Mapping[str, Entry]) -> list[Node]:
    """All metrics without states of their own inside of named entries, arithmetic left out."""
    return [
        _node(name, metric)
        for name, metric in named_metrics(entries)
        if not _holds_states(metric) and not isinstance(metric, CompositionalMetric)
    ]


def named_metrics(entries: Mapping[str, Entry]) -> list[tuple[str, Metric]]:
    """Every metric inside of named entries, with the first of its names."""
    found: dict[int, tuple[str, Metric]] = {}
    for name, entry in entries.items():
        for path, module in entry.named_modules():
            if isinstance(module, Metric):
                found.setdefault(id(module), (f"{name}.{path}" if path else name, module))
    return list(found.values())


def wrapped(module: nn.Module) -> Iterator[Metric]:
    """The metrics that a wrapper, a collection or arithmetic holds, but not what those hold."""
    for child in module.children():
        if isinstance(child, Metric):
            yield child
        else:
            yield from wrapped(child)


def followers(entries: Iterable[Entry]) -> dict[int, Metric]:
    """For metrics in collections whose states another metric holds too: that one, which leads itself, by their id.

    A metric may be in several collections, and behind another one in each.
    """
    found: dict[int, Metric] = {}

    def leading(metric: Metric) -> Metric:
        while id(metric) in found:
            metric = found[id(metric)]
        return metric

    for collection in collections(entries):
        members: dict[int, Metric] = {id(member): member for member in collection._modules.values()}
        for follower, leader in shared_states(collection).items():
            one, other = leading(leader), leading(members[follower])
            if one is not other:
                found[id(other)] = one
    return {follower: leading(leader) for follower, leader in found.items()}


def collections(entries: Iterable[Entry]) -> Iterator[MetricCollection]:
    """Every collection inside."""
    for entry in entries:
        for module in entry.modules():
            if isinstance(module, MetricCollection):
                yield module


def plain_attributes(metric: Metric) -> dict[str, Any]:
    """A metric's attributes that are no state: numbers, texts, types."""
    apart = {*BOOKKEEPING, *metric._defaults}
    return {name: value for name, value in vars(metric).items() if isinstance(value, _PLAIN) and name not in apart}


def _node(name: str, metric: Metric) -> Node:
    return Node(name, metric, plain_attributes(metric), _tensor_attributes(metric))


def _holds_states(metric: Metric) -> bool:
    """Whether it has states, and not only shows those of what it wraps, as `ClasswiseWrapper` does."""
    return bool(metric._defaults) and all(metric._defaults is not inner._defaults for inner in wrapped(metric))


def _tensor_attributes(metric: Metric) -> dict[str, tuple[torch.Tensor, int]]:
    return {
        name: (value, 0 if value.is_inference() else value._version)
        for name, value in vars(metric).items()
        if isinstance(value, torch.Tensor) and name not in metric._defaults and name not in BOOKKEEPING
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
