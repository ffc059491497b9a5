"""How far a run has come, beyond what the state's counters tell, and how that is read back from a saved state.

Contract: the loop keeps a `Progress` while it runs; `Engine.state_dict` saves from it what resuming in the middle of an
epoch needs, and `position_from` reads a saved state, or one written by hand as for PyTorch-Ignite, into a checked
`RunPosition`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from allstep.engine.events import is_count
from allstep.errors import ArgumentError

_COUNTS = {"iteration", "epoch", "epochs_completed", "epoch_began_at", "epoch_length", "max_epochs", "max_iters"}


@dataclass(slots=True)
class Progress:
    """What the state's counters do not tell: where the epoch began, and what was left in its middle.

    `epoch_is_open`: epoch `state.epoch` has begun and not ended. `step_is_open`: iteration `state.iteration` is counted
    and its step has not returned. `steps_in_group`: steps done of an accumulation group that is not complete; its
    gradients are lost when the run ends here, so it is begun again. `abandoned`: the open epoch was terminated by a
    handler, so that the next run begins the one after it.
    """

    epoch_began_at: int = 0
    epoch_is_open: bool = False
    step_is_open: bool = False
    steps_in_group: int = 0
    abandoned: bool = False


@dataclass(frozen=True, slots=True)
class RunPosition:
    """Where a saved run stood, and what it had been asked to do."""

    iteration: int
    epochs_completed: int
    epoch_began_at: int
    epoch_length: int | None
    max_epochs: int | None
    max_iters: int | None


def position_from(state_dict: Mapping[str, Any], user_keys: Iterable[str]) -> RunPosition:
    """Read a saved state. Raises ValueError naming the key that is missing, no count, or contradicts another."""
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(f"the state to load is {state_dict!r}; it must be a mapping, as state_dict() gives it")
    for key in _COUNTS & state_dict.keys():
        value = state_dict[key]
        if value is not None and not is_count(value, least=0):
            raise ArgumentError(f"{key} is {value!r} in the state to load; it must be an int of at least 0")
    missing = [key for key in ("epoch_length", *user_keys) if key not in state_dict]
    if missing:
        raise ArgumentError(f"the state to load lacks {', '.join(missing)}; it has {', '.join(state_dict)}")
    for pair in (("iteration", "epoch"), ("max_epochs", "max_iters")):
        if sum(key in state_dict for key in pair) != 1:
            raise ArgumentError(
                f"the state to load must have exactly one of {pair[0]} and {pair[1]}; it has {', '.join(state_dict)}"
            )
    if not isinstance(state_dict.get("finished"), str | None):
        raise ArgumentError(f"finished is {state_dict['finished']!r} in the state to load; it must be a text, why")
    length = state_dict["epoch_length"]
    if length is not None and length < 1:
        raise ArgumentError(f"epoch_length is {length} in the state to load; it must be at least 1, or None")
    if "epoch" in state_dict:
        if length is None and state_dict["epoch"]:
            raise ArgumentError("the state to load counts in epochs, so it needs an epoch_length; it has None")
        epochs = state_dict["epoch"]
        iteration = began_at = epochs * (length or 0)
    elif "epochs_completed" in state_dict and "epoch_began_at" in state_dict:
        iteration, epochs = state_dict["iteration"], state_dict["epochs_completed"]
        began_at = state_dict["epoch_began_at"]
    else:
        iteration = state_dict["iteration"]
        epochs = iteration // length if length else 0
        began_at = epochs * (length or 0)
    return RunPosition(iteration, epochs, began_at, length, state_dict.get("max_epochs"), state_dict.get("max_iters"))
