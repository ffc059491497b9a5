"""What `Checkpoint.resume` leaves to be done when the run begins, and what it reads besides the objects' states.

Contract: pure functions of what was loaded, and a record. `Checkpoint` alone calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from allstep.checkpoint import rng
from allstep.checkpoint.store import Loaded
from allstep.engine.registry import RemovableEventHandle
from allstep.world import current_data_ranks

TWIN = "the same as that of the rank before"
"""What a rank has for itself that computes its batches together with another one, which saves that for both."""


def own_state(objects: Mapping[str, Any], metrics: Mapping[str, float]) -> Any:
    """What this rank has for itself; of ranks that compute their batches together the first keeps it for all."""
    if current_data_ranks().is_twin:
        return TWIN
    return {"objects": objects, "generators": rng.capture(), "metrics": metrics}


def without_twins(loaded: Loaded) -> Loaded:
    """The same, with what ranks had for themselves once for each part of the data."""
    return replace(loaded, per_rank=[each for each in loaded.per_rank if each != TWIN])


@dataclass(slots=True)
class Resumption:
    """What is to be done when the run begins.

    Attributes:
        restore_generators: puts this rank's random generators back.
        inside_epoch: whether an engine goes on inside an epoch, so that it is done again before the first batch.
        handles: of the handlers that do so.
    """

    restore_generators: Callable[[], None]
    inside_epoch: bool
    handles: list[RemovableEventHandle] = field(default_factory=list)

    def end(self) -> None:
        """It is done, or another takes its place."""
        for handle in self.handles:
            handle.remove()


def saved_metrics(loaded: Loaded, rank: int) -> dict[str, float]:
    """The metrics that a rank had at a save, rated or not; rank 0's for a rank beyond those that saved."""
    states = loaded.per_rank
    own = states[rank if rank < len(states) else 0] if states else None
    before = dict(own.get("metrics", {})) if isinstance(own, Mapping) else {}
    return {**before, **loaded.manifest.metrics}


def generators_restorer(loaded: Loaded, rank: int, epoch: int) -> Callable[[], None]:
    """What puts a rank's random generators back, or seeds those of a rank beyond the saved ones."""
    own = loaded.per_rank[rank] if rank < len(loaded.per_rank) else None
    if isinstance(own, Mapping) and "generators" in own:
        return partial(rng.restore, own["generators"])
    return partial(rng.seed_for_rank, int(loaded.manifest.facts.get("seed") or 0), epoch, rank)
