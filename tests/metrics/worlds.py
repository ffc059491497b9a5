"""Metrics over simulated ranks, and over one, for tests to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection

from allstep import Alone, Engine
from allstep.coordination import Coordinator
from allstep.metrics import Metrics, Usage
from allstep.testing import simulate

Batch = tuple[torch.Tensor, ...]
Make = Callable[[], Mapping[str, Metric | MetricCollection]]


def take(engine: Engine, batch: Any) -> Any:
    return batch


def results(
    coordinator: Coordinator,
    make: Make,
    batches: Sequence[Any],
    transform: Callable[[Any], Any] | None = None,
    usage: Usage | Any = "epoch",
) -> dict[str, Any]:
    """What is in `state.metrics` after one pass over this rank's batches."""
    engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
    Metrics(make()).attach(engine, transform, usage)
    engine.run(list(batches))
    return dict(engine.state.metrics)


def over_ranks(make: Make, dealt: Sequence[Sequence[Any]], transform: Any = None, usage: Any = "epoch") -> list[Any]:
    """The results of each simulated rank, rank r taking the batches `dealt[r]`."""
    return simulate(lambda c: results(c, make, dealt[c.rank], transform, usage), len(dealt))


def on_one(make: Make, batches: Sequence[Any], transform: Any = None) -> dict[str, Any]:
    """The results of a single process over all batches."""
    return results(Alone(), make, batches, transform)


def deal(batches: Sequence[Any], world_size: int, *, empty: int | None = None) -> list[list[Any]]:
    """Batches given to ranks in turns and unevenly: rank r takes r + 1 before the next; rank `empty` takes none."""
    dealt: list[list[Any]] = [[] for _ in range(world_size)]
    order = [rank for rank in range(world_size) for _ in range(rank + 1) if rank != empty]
    for at, batch in enumerate(batches):
        dealt[order[at % len(order)]].append(batch)
    return dealt


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.device == other.device
            and one.contiguous().reshape(-1).view(torch.uint8).tolist()
            == other.contiguous().reshape(-1).view(torch.uint8).tolist()
        )
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return bool(one == other)


def all_same_bits(of_ranks: Sequence[Any]) -> bool:
    return all(same_bits(of_ranks[0], other) for other in of_ranks[1:])
