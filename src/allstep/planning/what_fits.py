"""What would fit a device: a short list of changes, tried in the order in which a person would.

Contract: `plan_that_fits` plans what was asked for. Where a memory is given that it does not fit, each change of
`changed` is planned, and the first that fits is `Plan.fitting`. The order is by what a change costs: first what takes
time alone (activations computed anew), then messages (ranks that hold copies hold parts), then both, smaller batches
with both, and last the host's memory. Each costs one more plan, so none is tried beyond the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch

from allstep.errors import ParallelError
from allstep.planning.absent_ranks import Training
from allstep.planning.memory_plan import Plan, mesh_in_words
from allstep.planning.planned_step import planned

CHANGED_OPTIONS = ("checkpoint_activations", "cpu_offload")
"""Those of `World.wrap` that are tried."""

_SMALLEST = 1 / 64  # of the batch


def plan_that_fits(
    training: Training, memory: int | None = None, plan_of: Callable[[Training], Plan] = planned
) -> Plan:
    """The plan of a training, with what would fit where it does not.

    Args:
        training: what is planned.
        memory: bytes of a device; None where nobody asks.
        plan_of: how a training is planned.

    Raises:
        ArgumentError, ArgumentTypeError, ParallelError: as `planned`.
    """
    plan = replace(plan_of(training), memory=memory)
    if memory is None or plan.fits(memory):
        return plan
    for changes, changed_training in changed(training):
        try:
            tried = plan_of(changed_training)
        except ParallelError:  # the model has no such units, say
            continue
        if tried.fits(memory):
            return replace(plan, fitting=replace(tried, memory=memory, changes=changes))
    return plan


def changed(training: Training) -> Iterator[tuple[tuple[str, ...], Training]]:
    """Trainings that take less memory, each with what was changed, in words."""
    recomputing = _recomputing(training)
    more_shards = _sharded(training)
    both = _sharded(recomputing[1]) if recomputing and more_shards else None
    yield from (each for each in (recomputing, more_shards) if each)
    if both and recomputing and more_shards:
        yield (*recomputing[0], *more_shards[0]), both[1]
    said = tuple(change for each in (recomputing, more_shards) if each for change in each[0])
    smallest = both[1] if both else (more_shards or recomputing or ((), training))[1]
    share = 1.0
    while (share := share / 2) >= _SMALLEST:
        smaller = _smaller(smallest, share)
        if smaller is None:
            break
        yield (*said, f"batches of {smaller[1]}"), smaller[0]
    if "shard" in smallest.mesh and not smallest.options.get("cpu_offload"):
        offloaded = replace(smallest, options={**smallest.options, "cpu_offload": True})
        yield (*said, "cpu_offload=True"), offloaded


_Changed = tuple[tuple[str, ...], Training]


def _recomputing(training: Training) -> _Changed | None:
    if training.options.get("checkpoint_activations") is not None:
        return None
    options = {**training.options, "checkpoint_activations": 1}
    return ("checkpoint_activations=1",), replace(training, options=options)


def _sharded(training: Training) -> _Changed | None:
    """All ranks that are given different data hold one copy together."""
    tensor = training.mesh.get("tensor", 1)
    ranks = prod(training.mesh.values()) if training.mesh else training.ranks
    if ranks // tensor == training.mesh.get("shard", 1):
        return None
    mesh = {"shard": ranks // tensor, **({"tensor": tensor} if tensor > 1 else {})}
    return (f"mesh {mesh_in_words(mesh)}",), replace(training, mesh=mesh)


def _smaller(training: Training, share: float) -> tuple[Training, int] | None:
    """The same with the first of each batch's samples, and their number; None where there is nothing to leave out."""
    lengths: list[int] = []
    training.rebuilt(training.batch, lambda leaf: lengths.append(len(leaf)) if _has_samples(leaf) else None)
    if not lengths or int(lengths[0] * share) < 1:
        return None
    kept = int(lengths[0] * share)

    def first(leaf: Any) -> Any:
        return leaf[:kept] if _has_samples(leaf) and len(leaf) == lengths[0] else leaf

    return replace(training, batch=training.rebuilt(training.batch, first)), kept


def _has_samples(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0
