"""`SaveBest`: keeps the best of a run by a metric, in a folder of its own.

Contract: attached on every rank alike to the engine that trains, and to the evaluator whose result decides where that
is another engine. Each time there is a new result it is compared with those of the saves that are kept. Only a better
one is saved: in the background, on all ranks or none, and `Store` removes the one that it replaces. The result has to
be the same on all ranks, as those of `Metrics` are, since each rank decides for itself. A result that is not a number
is never among the best, and of equal ones the older stays.

What was best so far is in the checkpoint of the trainer, so that a run that goes on from it decides as the unbroken run
would. What can go wrong: a save that fails is logged and training goes on; ranks whose results differ wait for each
other in a save, which the watchdog ends.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from allstep.checkpoint import Checkpoint
from allstep.engine import Engine, Events
from allstep.handlers.named_values import named_result, saved_values


class SaveBest:
    """Saves objects whenever a metric is better than before.

    Args:
        folder: where to save; not the folder of the run's own `Checkpoint`.
        objects: what to save, by name, as for `Checkpoint`.
        metric: the name of the result, in `state.metrics` of the engine that is looked at.
        mode: whether the largest ("max") or the smallest ("min") is best.
        count: how many to keep.

    Attributes:
        best: the best result so far; None before the first.
        checkpoint: the `Checkpoint` that saves.

    Raises:
        ArgumentError: count is less than 1, or there is no such mode.
        UnsupportedStateError: an object has no state that can be saved.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        objects: Mapping[str, Any],
        metric: str,
        mode: Literal["max", "min"] = "max",
        *,
        count: int = 1,
    ) -> None:
        self.metric = metric
        self.mode = mode
        self.count = count
        self._kept: list[float] = []  # results of the saves that are kept, the best first
        self._latest = math.nan
        # The newest is always one of the best, so keeping it keeps none besides.
        self.checkpoint = Checkpoint(
            folder,
            objects,
            every=None,
            keep_last=1,
            keep_best=(count, metric, mode),
            metrics=lambda engine: {metric: self._latest},
        )

    @property
    def best(self) -> float | None:
        """The best result so far; None before the first."""
        return self._kept[0] if self._kept else None

    def attach(self, trainer: Engine, evaluator: Engine | None = None) -> SaveBest:
        """Save in the runs of `trainer`. Returns self.

        Args:
            trainer: the engine that trains.
            evaluator: look at its results, whenever a run of it completes; by default at those of the trainer at each
                epoch's end.
        """
        if evaluator is None:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._look, trainer)
        else:
            evaluator.add_event_handler(Events.COMPLETED, self._look, trainer)
        trainer.add_event_handler(Events.COMPLETED, self.checkpoint.close)
        trainer.extension.add_state(self)
        return self

    def _look(self, engine: Engine, trainer: Engine) -> None:
        result = named_result(self, engine, self.metric)
        if math.isnan(result) or trainer.state.outcome == "failed":
            return
        sign = 1 if self.mode == "max" else -1
        if len(self._kept) >= self.count and sign * result <= sign * self._kept[-1]:
            return
        self._latest = result
        self._kept = sorted([*self._kept, result], key=lambda each: -sign * each)[: self.count]
        self.checkpoint.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The results of the saves that are kept."""
        return {"kept": list(self._kept)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError when a key is missing."""
        (kept,) = saved_values(self, state_dict, "kept")
        self._kept = [float(each) for each in kept]
