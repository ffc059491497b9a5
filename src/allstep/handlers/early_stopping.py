"""`EarlyStopping`: the run ends when a score has not improved for a while.

Contract: a callable handler, attached to the engine whose event says that there is a new score: most often the
evaluator's COMPLETED, or the trainer's own EPOCH_COMPLETED. It asks `trainer.terminate`, which stops all ranks at the
same iteration, whichever of them asked; the run is finished then, and a run that goes on from its checkpoint trains
nothing unless it is asked for more epochs. Ranks whose scores differ decide each for themselves, and the first to lose
patience stops all: give a score that is reduced over the ranks where that is not meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent, check_count
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.handlers.named_values import saved_values


class EarlyStopping:
    """Ends a run whose score stopped improving.

    Args:
        patience: events without an improvement after which the run ends, 1 or more.
        score_function: `engine -> float`, higher is better, called with the engine that this is attached to. A score
            that is not a number is no improvement.
        trainer: the engine whose run ends.
        min_delta: an improvement is a score above the best one by more than this, 0 or more.
        cumulative: compare with the last improvement, so that small steps add up; otherwise with the highest score.

    Raises:
        ValueError: patience or min_delta is out of range.
        TypeError: score_function is not callable, or trainer is no Engine.
    """

    def __init__(
        self,
        patience: int,
        score_function: Callable[[Engine], float],
        trainer: Engine,
        min_delta: float = 0.0,
        cumulative: bool = False,
    ) -> None:
        check_count("patience", patience, 1)
        if not min_delta >= 0:
            raise ArgumentError(f"min_delta is {min_delta!r}; it must be 0 or more")
        if not callable(score_function):
            raise ArgumentTypeError(f"score_function is {score_function!r}; it must be a function (engine) -> score")
        if not isinstance(trainer, Engine):
            raise ArgumentTypeError(f"trainer is {trainer!r}; it must be the Engine to stop")
        self.patience = patience
        self.score_function = score_function
        self.trainer = trainer
        self.min_delta = min_delta
        self.cumulative = cumulative
        self.best_score: float | None = None
        self.counter = 0

    def attach(self, engine: Engine, event: AnyEvent = Events.COMPLETED) -> EarlyStopping:
        """Look at the score whenever `event` of `engine` is fired. Returns self."""
        engine.add_event_handler(event, self)
        self.trainer.extension.add_state(self)
        return self

    def __call__(self, engine: Engine) -> None:
        """Take a new score into account; nothing in an iteration in which this rank has no batch."""
        if engine.extension.is_idle:
            return
        score = float(self.score_function(engine))
        best = self.best_score
        if not math.isnan(score) and (best is None or score > best + self.min_delta):
            self.best_score, self.counter = score, 0
            return
        # Without `cumulative` the bar rises with each small step, so that many of them are no improvement.
        if best is not None and score > best and not self.cumulative:
            self.best_score = score
        self.counter += 1
        if self.counter >= self.patience:
            reason = f"no better score than {self.best_score} in {self.counter} times"
            self.trainer.terminate(reason=reason, outcome="finished")

    def state_dict(self) -> dict[str, Any]:
        """The best score and how long it has stood."""
        return {"best_score": self.best_score, "counter": self.counter}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError when a key is missing."""
        self.best_score, self.counter = saved_values(self, state_dict, "best_score", "counter")
