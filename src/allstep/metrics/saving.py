"""Saving what one rank has counted, and going on from it on as many ranks as there now are.

Contract: both are local. A rank that is given the states of several saved ranks joins them: sums and extremes by their
operation, lists one after another. What only a reduction over ranks can join (a tensor that is averaged, stacked or
given to a function of the user's) is kept beside the own state and takes part in the next reduction as another rank's.
What a metric without states keeps, such as `MinMaxMetric`'s extremes of results, is of all ranks already, and is loaded
by every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from allstep.metrics.folding import fold
from allstep.metrics.nodes import Node
from allstep.metrics.reduction import copied
from allstep.metrics.states import element_wise

CarriedStates = MutableMapping[tuple[int, str], list[Any]]


def saved_states(
    found: Sequence[Node], carried: Mapping[tuple[int, str], Sequence[Any]], following: Mapping[int, Metric]
) -> dict[str, Any]:
    """What this rank has counted, by metric: tensors and lists, copied, and the number of batches.

    Args:
        found: all metrics.
        carried: what loaded states brought along.
        following: metrics whose states another one holds, and that one, by id.
    """
    by_id = {id(node.metric): node for node in found}
    sources = [(node, by_id[id(following.get(id(node.metric), node.metric))]) for node in found]
    return {
        node.name: {
            "updates": source.updates,
            "states": {name: copied(getattr(source.metric, name)) for name in node.states},
            "carried": {
                name: copied(list(carried[id(source.metric), name]))
                for name in node.states
                if (id(source.metric), name) in carried
            },
            "learnt": {**source.learnt(), **{name: copied(each) for name, each in source.tensors_changed().items()}},
        }
        for node, source in sources
    }


def load_states(
    found: Sequence[Node],
    stateless: Sequence[Node],
    states: Sequence[Mapping[str, Any]],
    every: Sequence[Mapping[str, Any]],
    carried: CarriedStates,
) -> None:
    """Have metrics hold what was saved; of several saved ranks, what these have together.

    Args:
        found: metrics with states.
        stateless: those without.
        states: what the saved ranks had that this rank goes on for.
        every: what all saved ranks had.
        carried: what states brought along, to be replaced.

    Raises:
        ValueError: a state is of other metrics; nothing was changed.
    """
    for state in every:
        _check([*found, *stateless], state)
    carried.clear()
    for node in found:
        node.metric.reset()
        saved = [state[node.name] for state in states]
        _learn(node, saved)
        for name, default in node.states.items():
            own = [each["states"][name] for each in saved if each["updates"] or isinstance(default, list)]
            brought = [value for each in saved for value in each["carried"].get(name, ())]
            if not own and not brought:
                continue
            joined, rest = _joined(node, name, default, own, brought)
            setattr(node.metric, name, joined)
            if rest:
                carried[id(node.metric), name] = rest
        node.metric._update_count = sum(each["updates"] for each in saved)
    for node in stateless:
        _learn(node, [state[node.name] for state in every[:1]])
        node.metric._update_count = sum(state[node.name]["updates"] for state in states)


def _learn(node: Node, saved: Sequence[Mapping[str, Any]]) -> None:
    """What the first of the saved ranks kept beside states that kept anything."""
    node.begin_again()
    for each in reversed(saved):
        learnt = {name: _on(value, node.metric.device) for name, value in each["learnt"].items()}
        vars(node.metric).update(learnt)


def _joined(node: Node, name: str, default: Any, own: list[Any], brought: list[Any]) -> tuple[Any, list[Any]]:
    """The state that this rank goes on with, and what stays beside it."""
    device = node.metric.device
    if isinstance(default, list):
        return [_on(value, device) for values in [*own, brought] for value in values], []
    op = element_wise(node.metric._reductions[name])
    if op is not None:
        return fold([_on(value, device) for value in own], op).to(own[0].dtype), []
    first, *rest = [_on(value, device) for value in [*own, *brought]]
    return first, rest


def _check(found: Sequence[Node], state: Mapping[str, Any]) -> None:
    names = [node.name for node in found]
    if list(state) != names:
        raise ValueError(f"the state to load is of metrics {', '.join(state)}; these are {', '.join(names)}")
    for node in found:
        saved = state[node.name]["states"]
        if saved.keys() != node.states.keys():
            raise ValueError(
                f"metric {node.name!r} has states {', '.join(node.states)}; the state to load has {', '.join(saved)}"
            )
        for name, default in node.states.items():
            if isinstance(default, torch.Tensor) and isinstance(saved[name], torch.Tensor):
                have, given = getattr(node.metric, name).shape, saved[name].shape
                if given != have and not _spreads(default.shape, given):
                    raise ValueError(
                        f"metric {node.name!r}, state {name!r}, has shape {tuple(have)}; the state to load has "
                        f"{tuple(given)}"
                    )


def _spreads(beginning: torch.Size, shape: torch.Size) -> bool:
    """Whether an update may have made a state of this shape of its beginning."""
    pairs = zip(reversed(beginning), reversed(shape), strict=False)
    return len(beginning) <= len(shape) and all(one in (1, other) for one, other in pairs)


def _on(value: Any, device: torch.device) -> Any:
    return value.detach().clone().to(device) if isinstance(value, torch.Tensor) else value
