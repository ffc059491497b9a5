"""Counts of samples: of this rank in a run, and of all ranks in an accumulation group.

Contract: both are attached on every rank alike. `UnitCount` counts samples, tokens or whatever is counted, and a batch
once: not for ranks that run a filler, nor when its accumulation group is done again. The count of the whole run is in
the checkpoint; at another world size ranks share what was saved. `count_group_samples` is for a handler whose steps are
a matter of samples: at OPTIMIZER_STEP_COMPLETED `engine.extension.samples_in_group()` is the number then, the same on
all ranks and without asking them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent, check_function
from allstep.errors import ArgumentError
from allstep.handlers.named_values import saved_values
from allstep.world import current_data_ranks


class UnitCount:
    """Counts what is in batches.

    Args:
        count: `batch -> int`, such as the tokens in it; by default samples are counted.

    Attributes:
        in_run: what this rank has counted in the whole run.
        in_batch: in its present batch, or its last one.

    Raises:
        ArgumentTypeError: count is not callable.
    """

    state_differs_by_rank = True

    def __init__(self, count: Callable[[Any], int] | None = None) -> None:
        check_function("count", count, "a batch", optional=True)
        self.count = count
        self.in_run = self.in_batch = 0
        self._counted_until = 0  # the iteration

    def attach(self, engine: Engine) -> UnitCount:
        """Count in the runs of `engine`. Returns self."""
        engine.add_event_handler(Events.STARTED, self._start_count)
        if self.count is None:
            engine.extension.count_samples()
        # A function counts before the step, which may change its batch.
        counted_at = Events.ITERATION_COMPLETED if self.count is None else Events.ITERATION_STARTED
        engine.add_event_handler(counted_at, self._count_batch)
        engine.extension.add_state(self)
        return self

    def _start_count(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self.in_run = self._counted_until = 0

    def _count_batch(self, engine: Engine) -> None:
        state = engine.state
        if state.iteration > self._counted_until:
            self._counted_until = state.iteration
            self.in_batch = 0
            if state.active:
                self.in_batch = int((state.samples or 0) if self.count is None else self.count(state.batch))
            self.in_run += self.in_batch

    def state_dict(self) -> dict[str, Any]:
        """How much this rank has counted in the whole run."""
        return {"units": self.in_run}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError when a key is missing."""
        (self.in_run,) = map(int, saved_values(self, state_dict, "units"))

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take this rank's share of what all ranks of a checkpoint counted."""
        data = current_data_ranks()
        self.in_run = sum(int(each["units"]) for each in states[data.rank :: data.size])


def count_group_samples(engine: Engine, event: AnyEvent) -> None:
    """Have samples counted in the coming runs.

    Args:
        engine: that trains.
        event: at which the handler asks for them.

    Raises:
        ArgumentError: it is another event than OPTIMIZER_STEP_COMPLETED.
    """
    if event is not Events.OPTIMIZER_STEP_COMPLETED:
        raise ArgumentError(f"event is {event!r}; samples are counted at OPTIMIZER_STEP_COMPLETED, its default")
    engine.extension.count_samples()
