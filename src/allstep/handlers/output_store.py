"""`OutputStore`: keeps what this rank's steps returned, over an epoch or the whole run.

Contract: attached to one engine, it keeps the output of each iteration in which this rank has a batch of its own, in
order, tensors without their graph. For the outputs of all ranks, in the order of the dataset, use `Gather`. What it
keeps is in the checkpoint, each rank's own, so that a run that goes on inside an epoch has the epoch's outputs. At
another world size ranks share what was saved. What can go wrong: memory, since all of it stays; keep little of a large
output with `transform`, and every so many iterations with `every`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from allstep.engine import Engine, Events
from allstep.engine.events import AnyEvent, check_count, check_function
from allstep.errors import ArgumentError
from allstep.handlers.named_values import saved_values
from allstep.world import current_data_ranks

Keep = Literal["epoch", "run"]


class OutputStore:
    """Keeps outputs.

    Args:
        transform: `output -> what to keep`; by default the output itself.
        keep: for how long: "epoch", or "run".
        every: keep those of every so many iterations.

    Attributes:
        data: what was kept, in order.

    Raises:
        ArgumentError: keep has no such value, or every is no int of at least 1.
        ArgumentTypeError: transform is not callable.
    """

    state_differs_by_rank = True

    def __init__(
        self, transform: Callable[[Any], Any] = lambda output: output, *, keep: Keep = "epoch", every: int = 1
    ) -> None:
        check_function("transform", transform, "a step's output")
        if keep not in get_args(Keep):
            raise ArgumentError(f'keep is {keep!r}; it must be "epoch" or "run"')
        check_count("every", every, 1)
        self.transform = transform
        self.keep = keep
        self.every = every
        self.data: list[Any] = []
        self._kept_until = 0  # the iteration

    def attach(self, engine: Engine) -> OutputStore:
        """Keep outputs of `engine`. Returns self."""
        beginning: AnyEvent = Events.EPOCH_STARTED if self.keep == "epoch" else Events.STARTED
        engine.add_event_handler(beginning, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._take)
        engine.extension.add_state(self)
        return self

    def _begin(self, engine: Engine) -> None:
        # A run that goes on fires its beginning too, and keeps what it has.
        began_at = engine.extension.epoch_began_at if self.keep == "epoch" else 0
        if engine.state.iteration <= began_at:
            self.data, self._kept_until = [], began_at

    def _take(self, engine: Engine) -> None:
        iteration = engine.state.iteration
        # An accumulation group that is begun again after a failure: its outputs are there.
        if engine.extension.is_idle or (iteration <= self._kept_until and engine.extension.is_repeated):
            return
        self._kept_until = iteration
        self.data.append(_detached(self.transform(engine.state.output)))

    def state_dict(self) -> dict[str, Any]:
        """What this rank has kept."""
        return {"data": list(self.data)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError when a key is missing."""
        (data,) = saved_values(self, state_dict, "data")
        self.data, self._kept_until = list(data), 0

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take this rank's share of what all ranks of a checkpoint kept."""
        data = current_data_ranks()
        self.load_state_dict({"data": [each for state in states[data.rank :: data.size] for each in state["data"]]})


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_detached(each) for each in value)
    return value
