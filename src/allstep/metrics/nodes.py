"""What of a metric is fed and what of it holds states: metrics may be collections, wrappers and arithmetic on others.

Contract: pure functions over a metric as it was made. `leaves` are fed with batches, each once, however often it occurs
in arithmetic: torchmetrics' `p * r / (p + r)` would feed p and r twice. `nodes` are all metrics inside that hold states
of their own, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.metric import CompositionalMetric

from allstep.metrics.running import Weighted
from allstep.metrics.sharing import shared_states

Entry: TypeAlias = Metric | MetricCollection

# What torchmetrics itself keeps of a metric beside its states; an update changes it on every rank for itself.
_BOOKKEEPING = frozenset(
    {
        *("_update_count", "_computed", "_forward_cache", "_is_synced", "_cache", "_to_sync", "_should_unsync"),
        *("_enable_grad", "_device", "_dtype", "training", "compute_on_cpu"),
    }
)
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A metric that holds states. `began` has the plain attributes that it was made with."""

    name: str
    metric: Metric
    began: Mapping[str, Any] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Batches that it has taken in."""
        return int(self.metric._update_count)

    def learnt(self) -> dict[str, Any]:
        """Plain attributes beside the states that updates have set, which a rank without a batch lacks."""
        return {
            name: value for name, value in plain_attributes(self.metric).items() if not self._began_with(name, value)
        }

    def _began_with(self, name: str, value: Any) -> bool:
        missing: Any = _BOOKKEEPING
        before = self.began.get(name, missing)
        return bool(before is value or (before is not missing and before == value))


def leaves(entries: Iterable[Entry]) -> list[Entry]:
    """What is fed with each batch, without repetition."""
    found: dict[int, Entry] = {}
    waiting = list(entries)
    while waiting:
        entry = waiting.pop(0)
        if isinstance(entry, CompositionalMetric):
            waiting += [part for part in (entry.metric_a, entry.metric_b) if isinstance(part, Metric)]
        else:
            found.setdefault(id(entry), entry)
    return list(found.values())


def nodes(entries: Mapping[str, Entry]) -> list[Node]:
    """All metrics with states inside of named entries, without repetition."""
    found: dict[int, Node] = {}
    for name, entry in entries.items():
        for path, module in entry.named_modules():
            if isinstance(module, Metric) and module._defaults and id(module) not in found:
                found[id(module)] = Node(f"{name}.{path}" if path else name, module, plain_attributes(module))
    return list(found.values())


def followers(entries: Iterable[Entry]) -> dict[int, Metric]:
    """For metrics in collections whose states another member holds too: that member, by the metric's id."""
    return {
        follower: leader
        for entry in entries
        for module in entry.modules()
        if isinstance(module, MetricCollection)
        for follower, leader in shared_states(module).items()
    }


def takes_samples(entry: Entry) -> bool:
    """Whether a metric, or one inside of it, is told how many samples a batch has."""
    return any(isinstance(module, Weighted) for module in entry.modules())


def syncs_itself(metric: Metric) -> bool:
    """Whether a metric brings a way of its own to reduce its states over ranks."""
    own = type(metric)._sync_dist is not Metric._sync_dist and not isinstance(metric, CompositionalMetric)
    return own or metric.dist_sync_fn is not None


def all_metrics(entries: Iterable[Entry]) -> Iterator[Metric]:
    """Every metric inside, with states or without."""
    seen: set[int] = set()
    for entry in entries:
        for module in entry.modules():
            if isinstance(module, Metric) and id(module) not in seen:
                seen.add(id(module))
                yield module


def plain_attributes(metric: Metric) -> dict[str, Any]:
    """A metric's attributes that are no state: numbers, texts, types."""
    return {
        name: value for name, value in vars(metric).items() if isinstance(value, _PLAIN) and name not in _BOOKKEEPING
    }
