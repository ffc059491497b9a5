"""Metrics with a way of their own to reduce over ranks: an overridden `_sync_dist`, or a `dist_sync_fn`.

Contract: `sync_by_itself` calls the metric's own `_sync_dist` on every rank, with a gathering function that goes
through the coordinator, and gives back the states that it left. The metric is put back. Such a metric decides by its
own data how often it gathers; ranks that gather unequally often, or fail, would wait for each other, so each says at
every step whether it gathers once more or is done, and all raise the same error when they do not match.
"""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric

from allstep.coordination import Coordinator
from allstep.errors import MetricError, MetricMismatchError
from allstep.metrics.nodes import Node


class _Unequal(Exception):
    """Another rank was done, or had failed, while this one gathered."""


class _Turns:
    """This rank's gathers for one metric."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.count = 0

    def gather(self, tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        """What torchmetrics' gathering function does."""
        self.count += 1
        said = self._coordinator.gather(("tensor", tensor.detach().cpu()))
        if any(kind != "tensor" for kind, _ in said):
            raise _Unequal
        return [found.to(tensor.device) for _, found in said]

    def finish(self, failure: str | None) -> list[tuple[int, str | None]]:
        """Wait until every rank is done; how often each gathered, and what it failed with."""
        while True:
            said = self._coordinator.gather(("done", (self.count, failure)))
            if all(kind == "done" for kind, _ in said):
                return [what for _, what in said]


def sync_by_itself(coordinator: Coordinator, node: Node) -> dict[str, Any]:
    """States of all ranks together, as the metric's own way leaves them.

    Raises:
        MetricMismatchError: ranks gathered unequally often.
        MetricError: it failed on a rank; on all of them.
    """
    metric, turns = node.metric, _Turns(coordinator)
    before = {name: getattr(metric, name) for name in metric._defaults}
    failure: BaseException | None = None
    try:
        for name, value in metric._copy_state_dict().items():
            setattr(metric, name, value)
        metric._sync_dist(_gathering(metric, turns), process_group=metric.process_group)
        synced = {name: getattr(metric, name) for name in metric._defaults}
    except _Unequal:
        synced = {}
    except Exception as error:
        synced, failure = {}, error
    finally:
        for name, value in before.items():
            setattr(metric, name, value)
    said = turns.finish(None if failure is None else repr(failure))
    failed = "; ".join(f"rank {rank}: {text}" for rank, (_, text) in enumerate(said) if text is not None)
    if failed:
        raise MetricError(f"metric {node.name!r} could not be reduced in its own way: {failed}") from failure
    counts = [count for count, _ in said]
    if len(set(counts)) > 1:
        shown = ", ".join(f"{count} on rank {rank}" for rank, count in enumerate(counts))
        raise MetricMismatchError(
            f"metric {node.name!r} ({type(metric).__name__}) reduces its states in a way of its own and gathers "
            f"unequally often: {shown} times. Give every rank as many batches, or reduce it with the states' reductions"
        )
    return synced


def _gathering(metric: Metric, turns: _Turns) -> Any:
    if metric.dist_sync_fn is None:
        return turns.gather
    given = metric.dist_sync_fn

    def gather(tensor: torch.Tensor, group: Any = None) -> Any:
        turns.gather(torch.empty(0))  # whether all ranks gather now; the user's function waits for all of them
        return given(tensor, group)

    return gather
