"""Saving what one rank has counted, and going on from it on as many ranks as there now are.

Contract: both are local. A rank that is given the states of several saved ranks joins them: sums and extremes by their
operation, lists one after another. What only a reduction over ranks can join (a tensor that is averaged, stacked or
given to a function of the user's) is kept beside the own state and takes part in the next reduction as another rank's.
What a metric without states keeps, such as `MinMaxMetric`'s extremes of results, is of all ranks already, and is loaded
by every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from allstep.errors import ArgumentError
from allstep.metrics.folding import fold
from allstep.metrics.nodes import MetricNode, MetricSet
from allstep.metrics.reduction import copied
from allstep.metrics.states import elementwise_op
from allstep.metrics.torchmetrics_private import set_update_count


def saved_states(metrics: MetricSet) -> dict[str, Any]:
    """What this rank has counted, by metric: tensors and lists, copied, and the number of batches."""
    nodes, unmerged = [*metrics.nodes, *metrics.stateless], metrics.unmerged
    by_id = {id(node.metric): node for node in nodes}
    saved: dict[str, Any] = {}
    for node in nodes:
        # A member that shares another one's states is not fed, so what that one holds is saved for both.
        source = by_id[id(metrics.leaders.get(id(node.metric), node.metric))]
        saved[node.name] = {
            "updates": source.updates,
            "states": {name: copied(getattr(source.metric, name)) for name in node.defaults},
            "carried": {
                name: copied(list(unmerged[id(source.metric), name]))
                for name in node.defaults
                if (id(source.metric), name) in unmerged
            },
            "learnt": {
                **source.changed_values(),
                **{name: copied(tensor) for name, tensor in source.changed_tensors().items()},
            },
        }
    return saved


def load_states(metrics: MetricSet, share: Sequence[Mapping[str, Any]], every: Sequence[Mapping[str, Any]]) -> None:
    """Have metrics hold what was saved; of several saved ranks, what these have together.

    Args:
        metrics: to hold it.
        share: what the saved ranks had that this rank goes on for.
        every: what all saved ranks had.

    Raises:
        ArgumentError: a state is of other metrics; nothing was changed.
    """
    # All are checked before any is loaded, so that an error changes nothing.
    for state in every:
        _check_fits([*metrics.nodes, *metrics.stateless], state)
    metrics.unmerged.clear()
    for node in metrics.nodes:
        node.metric.reset()
        saved = [state[node.name] for state in share]
        _load_attributes(node, saved)
        for name, default in node.defaults.items():
            # A tensor of a rank that saw no batch is only its default, which a mean or a stack must not take in.
            own = [each["states"][name] for each in saved if each["updates"] or isinstance(default, list)]
            brought = [value for each in saved for value in each["carried"].get(name, ())]
            if not own and not brought:
                continue
            joined, rest = _joined(node, name, default, own, brought)
            setattr(node.metric, name, joined)
            if rest:
                metrics.unmerged[id(node.metric), name] = rest
        set_update_count(node.metric, sum(each["updates"] for each in saved))
    for node in metrics.stateless:
        # What it keeps comes from results of all ranks, so that every saved rank had the same.
        _load_attributes(node, [state[node.name] for state in every[:1]])
        set_update_count(node.metric, sum(state[node.name]["updates"] for state in share))


def _load_attributes(node: MetricNode, saved: Sequence[Mapping[str, Any]]) -> None:
    """What the first of the saved ranks kept beside states that kept anything."""
    node.restore_attributes()
    for each in reversed(saved):
        values = {name: _on_device(value, node.metric.device) for name, value in each["learnt"].items()}
        vars(node.metric).update(values)


def _joined(node: MetricNode, name: str, default: Any, own: list[Any], brought: list[Any]) -> tuple[Any, list[Any]]:
    """The state that this rank goes on with, and what stays beside it."""
    device = node.metric.device
    if isinstance(default, list):
        return [_on_device(value, device) for values in [*own, brought] for value in values], []
    op = elementwise_op(node.reductions[name])
    if op is not None:
        return fold([_on_device(value, device) for value in own], op).to(own[0].dtype), []
    # Only the reduction itself knows how these join; the further ones enter it beside this rank's own.
    first, *rest = [_on_device(value, device) for value in [*own, *brought]]
    return first, rest


def _check_fits(nodes: Sequence[MetricNode], state: Mapping[str, Any]) -> None:
    names = [node.name for node in nodes]
    if list(state) != names:
        raise ArgumentError(f"the state to load is of metrics {', '.join(state)}; these are {', '.join(names)}")
    for node in nodes:
        saved = state[node.name]["states"]
        if saved.keys() != node.defaults.keys():
            raise ArgumentError(
                f"metric {node.name!r} has states {', '.join(node.defaults)}; the state to load has {', '.join(saved)}"
            )
        for name, default in node.defaults.items():
            if isinstance(default, torch.Tensor) and isinstance(saved[name], torch.Tensor):
                shape, saved_shape = getattr(node.metric, name).shape, saved[name].shape
                if saved_shape != shape and not _spreads(default.shape, saved_shape):
                    raise ArgumentError(
                        f"metric {node.name!r}, state {name!r}, has shape {tuple(shape)}; the state to load has "
                        f"{tuple(saved_shape)}"
                    )


def _spreads(initial: torch.Size, shape: torch.Size) -> bool:
    """Whether an update may have made a state of this shape of its default."""
    pairs = zip(reversed(initial), reversed(shape), strict=False)
    return len(initial) <= len(shape) and all(one in (1, other) for one, other in pairs)


def _on_device(value: Any, device: torch.device) -> Any:
    return value.detach().clone().to(device) if isinstance(value, torch.Tensor) else value
