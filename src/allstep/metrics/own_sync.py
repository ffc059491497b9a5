"""Metrics with a way of their own to reduce over ranks: an overridden `_sync_dist`, or a `dist_sync_fn`.

Contract: `sync_by_itself` calls the metric's own `_sync_dist` on every rank, with a gathering function that goes
through the coordinator, and gives back the states that it left. The metric is put back. Such a metric decides by its
own data how often it gathers; ranks that gather unequally often, or fail, would wait for each other, so each says at
every step whether it gathers once more or is done, and all raise the same error when they do not match.

torchmetrics' own `_sync_dist`, which most of these call first, gathers each element of a list for itself, so that ranks
whose lists differ in length gather unequally often; and a rank that has nothing left to gather goes on to the metric's
own collectives, where nobody meets it. So while `sync_by_itself` runs, a class of its own stands between the metric's
class and torchmetrics', and gives all states to all ranks at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import new_class
from typing import Any

import torch
from torchmetrics import Metric

from allstep.coordination import Coordinator
from allstep.errors import MetricError, MetricMismatchError
from allstep.metrics.folding import fold, fold_listed
from allstep.metrics.nodes import Node
from allstep.metrics.states import ListedState, element_wise


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

    def reduce(self, metric: Metric) -> None:
        """What torchmetrics' own `_sync_dist` does, for lists of any lengths."""
        self.count += 1
        held = {name: getattr(metric, name) for name in metric._reductions}
        said = self._coordinator.gather(("states", (int(metric._update_count), _moved(held, torch.device("cpu")))))
        if any(kind != "states" for kind, _ in said):
            raise _Unequal
        for name, reduction in metric._reductions.items():
            ranks = [(updates, states[name]) for _, (updates, states) in said]
            setattr(metric, name, _moved(_reduced(metric, name, reduction, ranks), metric.device))

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
        with _reducing_at_once(metric):
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


class _AtOnce(Metric):
    """What a metric's own `_sync_dist` finds in the place of torchmetrics'."""

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        turns = getattr(dist_sync_fn, "__self__", None)
        if isinstance(turns, _Turns):
            turns.reduce(self)
        else:
            super()._sync_dist(dist_sync_fn, process_group)


@cache
def _between(kind: type[Metric]) -> type[Metric]:
    """A class like `kind` for which `super()._sync_dist` at its end is `_AtOnce`'s."""
    return new_class(kind.__name__, (kind, _AtOnce))


@contextmanager
def _reducing_at_once(metric: Metric) -> Iterator[None]:
    kind = type(metric)
    if kind._sync_dist is Metric._sync_dist:  # it has a gathering function of its own, which is called as ever
        yield
        return
    object.__setattr__(metric, "__class__", _between(kind))
    try:
        yield
    finally:
        object.__setattr__(metric, "__class__", kind)


def _reduced(metric: Metric, name: str, reduction: Any, ranks: list[tuple[int, Any]]) -> Any:
    """One state of all ranks, given how many batches each has taken and what it holds."""
    op = element_wise(reduction)
    if isinstance(metric._defaults[name], torch.Tensor) and op is not None:
        return fold([value for _, value in ranks], op)
    is_list = isinstance(metric._defaults[name], list)
    state = ListedState(0, name, is_list, reduction)
    if is_list:
        given = [value if isinstance(value, list) else [value] for _, value in ranks]
    else:
        given = [[value] if updates else [] for updates, value in ranks]
    folded = fold_listed(state, type(metric).__name__, given)
    return getattr(metric, name) if folded is None else folded


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return [_moved(each, device) for each in value] if isinstance(value, list) else value


def _gathering(metric: Metric, turns: _Turns) -> Any:
    if metric.dist_sync_fn is None:
        return turns.gather
    given = metric.dist_sync_fn

    def gather(tensor: torch.Tensor, group: Any = None) -> Any:
        turns.gather(torch.empty(0))  # whether all ranks gather now; the user's function waits for all of them
        return given(tensor, group)

    return gather
