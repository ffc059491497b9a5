"""What a call of `Engine.run` is to do: begin anew, go on, or nothing. Checks and decisions, all of them pure.

Contract: `Engine` calls the checks when it is made and `settle_terms` before a run has changed or fired anything, so
that a refused call loses nothing. An error names the argument, its value and what is expected.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from allstep.coordination import POLICIES, Uneven
from allstep.engine.events import check_count, is_count
from allstep.engine.replica_audit import INTERVAL
from allstep.engine.state import State
from allstep.errors import ArgumentError, ArgumentTypeError, DataError
from allstep.parallel import Precision
from allstep.suggestions import did_you_mean

SamplesIn = Callable[[Any], int]
"""`batch -> int`: how many samples a batch has."""


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What an engine was made with, besides its step; `Engine` says what each is. Checked when it is made."""

    name: str
    accumulate: int = 1
    samples_in: SamplesIn | None = None
    uneven: Uneven = "shortest"
    idle: Literal["filler", "skip"] = "filler"
    resumes: bool | None = None
    precision: Precision = "no"
    audit: int | None = INTERVAL

    def __post_init__(self) -> None:
        check_choice("uneven", self.uneven, POLICIES)
        check_choice("idle", self.idle, ("filler", "skip"))
        check_choice("precision", self.precision, get_args(Precision))
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ArgumentError(f"accumulate is {self.accumulate!r}; it must be an int of at least 1")
        if self.audit is not None and (not isinstance(self.audit, int) or self.audit < 1):
            raise ArgumentError(
                f"audit is {self.audit!r}; it must be an int of at least 1, or None for an audit at epochs' ends alone"
            )


@dataclass(frozen=True, slots=True)
class RunArguments:
    """What `Engine.run` was asked for besides the data; ranks compare all of it. See there."""

    max_epochs: int | None
    max_iters: int | None
    epoch_length: int | None
    uneven: Uneven
    window: int | None
    lookahead: int | None


def check_step(step: Callable[..., Any]) -> None:
    """Raise ArgumentTypeError or ArgumentError unless a step can be called with (engine, batch)."""
    if not callable(step):
        raise ArgumentTypeError(f"process_function is {step!r}; it must be a function (engine, batch)")
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # some builtins tell no signature
        return
    # Only whether two positional arguments fit: what their names are is the user's own affair.
    try:
        signature.bind(None, None)
    except TypeError:
        name = getattr(step, "__name__", step)
        raise ArgumentError(
            f"process_function is called with (engine, batch), but {name!r} takes {signature}"
        ) from None


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ArgumentError unless a value is one of the choices."""
    if value not in choices:
        near = did_you_mean(str(value), choices)
        raise ArgumentError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}{near}")


def check_accumulation(modules: Iterable[nn.Module], group_size: int) -> None:
    """Raise ArgumentError when gradients cannot be added up over the iterations of a group before they are reduced."""
    if group_size > 1 and any(getattr(module, "static_graph", False) for module in modules):
        raise ArgumentError(
            f"gradients are accumulated over {group_size} iterations, and a module is in DDP with static_graph=True, "
            "which reduces them in every backward pass; wrap it without static_graph, or do not accumulate"
        )


def check_precision(modules: Sequence[nn.Module], precision: Precision) -> None:
    """Raise ArgumentError when there is no module whose forward passes could be in a precision."""
    if precision != "no" and not modules:
        raise ArgumentError(
            f"precision is {precision!r}, and the engine knows no module whose forward passes it is for; wrap the "
            "model with world.wrap, or append it to engine.modules"
        )


def check_agreement(uneven: str, window: int | None, lookahead: int | None, group_size: int) -> None:
    """Raise ArgumentError unless ranks can agree in this way; they are known to say the same."""
    check_choice("uneven", uneven, POLICIES)
    check_count("window", window, 1, optional=True)
    if lookahead is not None and not is_count(lookahead, least=group_size):
        raise ArgumentError(
            f"lookahead is {lookahead!r}; it must be an int of at least {group_size}, one accumulation group"
        )


@dataclass(frozen=True, slots=True)
class RunTerms:
    """What a run is to do. `fresh` says that its counters begin at zero.

    `epoch_length` was given where an epoch is not a pass over the data, and is what the data says where it is.
    """

    fresh: bool
    epoch_is_pass: bool
    epoch_length: int | None
    max_epochs: int | None
    max_iters: int | None


def length_of(data: Any) -> int | None:
    """Number of batches in one pass over `data`, for the whole world where it knows; None when it does not."""
    of_all = length_of_all(data)
    return len_of(data) if of_all is None else of_all


def checked_length(data: Any) -> int | None:
    """The same for a rank that has nobody to agree with. Raises DataError when there is no batch."""
    length = length_of(data)
    if length == 0:
        raise DataError(f"data is empty: len({type(data).__name__}) is 0; give at least one batch")
    return length


def length_of_all(data: Any) -> int | None:
    """Number of batches of the whole world in one pass over data that is dealt to ranks; None for other data."""
    of_all = getattr(getattr(data, "batch_sampler", None), "global_length", None)
    return None if of_all is None else int(of_all)


def exact_length(data: Any) -> int | None:
    """Batches in a pass over `data` where it gives exactly so many; None where only reading to its end tells.

    A sequence and a sampler do. The length of an iterable dataset is in samples and in torch only an estimate of
    batches: each worker rounds its own part. What the `__len__` of any other object means nobody knows.
    """
    sampler = getattr(data, "batch_sampler", None)
    dealt = getattr(sampler, "batches_in_epoch", None)
    if dealt is not None:
        return int(dealt)
    if isinstance(data, DataLoader):
        is_plain = sampler is None or type(sampler) is BatchSampler
        return len_of(data) if is_plain and not isinstance(data.dataset, IterableDataset) else None
    return len(data) if isinstance(data, Sequence) and not hasattr(data, "__next__") else None


def lengths_of(data: Any) -> tuple[int | None, int | None]:
    """Batches in a pass over `data`: exactly, and as it says."""
    exact = exact_length(data)
    return exact, length_of(data) if exact is None else exact


def len_of(data: Any) -> int | None:
    """`len(data)`, or None when it has none."""
    if data is None or not hasattr(data, "__len__"):
        return None
    try:
        return len(data)
    except TypeError:  # a DataLoader over an iterable dataset has __len__ and no length
        return None


def is_done(iteration: int, epochs_completed: int, max_epochs: int | None, max_iters: int | None) -> bool:
    """Whether the iterations or epochs asked for have been run."""
    if max_iters is not None:
        return iteration >= max_iters
    return max_epochs is not None and epochs_completed >= max_epochs


def begins_anew(
    state: State, max_epochs: int | None, max_iters: int | None, *, epochs_completed: int, resuming: bool
) -> bool:
    """Whether a run with these arguments begins at zero. Where they contradict the state, `settle_terms` says so.

    `resuming` says that the state was loaded or the run is suspended, so that a finished state is not begun anew.
    """
    if state.max_epochs is None and state.max_iters is None:
        return True
    if max_iters is not None and state.max_epochs is not None:  # counted in epochs before, and in iterations now
        return True
    if max_epochs is not None and state.max_iters is not None:
        return True
    most = max_epochs or state.max_epochs, max_iters or state.max_iters
    return is_done(state.iteration, epochs_completed, *most) and not resuming


def is_evaluation(settings: StepSettings, state: State, *, nested: bool) -> bool:
    """Whether a run that was left in its middle is done anew: a result over parts of two runs would mean nothing.

    `nested` says that it is run in a step or handler of another engine, which has trained on meanwhile.
    """
    if settings.resumes is not None:
        return not settings.resumes
    return nested and (state.max_epochs == 1 or state.max_iters is not None)


def asks_for_more(terms: RunTerms, state: State) -> bool:
    """Whether a run with these terms is to do more than the one that left `state`."""
    return (terms.max_epochs or 0) > (state.max_epochs or 0) or (terms.max_iters or 0) > (state.max_iters or 0)


def settle_terms(
    state: State,
    data: Any,
    max_epochs: int | None,
    max_iters: int | None,
    epoch_length: int | None,
    *,
    length: int | None,
    epochs_completed: int,
    resuming: bool,
    epoch_was_pass: bool,
) -> RunTerms:
    """Decide what a run with these arguments does, from the state that the last one left.

    Args:
        state: read, not changed.
        data: the argument of `run`, None when there is none.
        max_epochs: the argument of `run`, as are `max_iters` and `epoch_length`.
        length: batches in one pass over the data, as agreed by all ranks; None while unknown.
        epochs_completed: epochs that ended, not counting one that was left in its middle.
        resuming: the state was loaded or the run is suspended, so that a finished state is not begun anew.
        epoch_was_pass: an epoch of the last run was a pass over its data.

    Raises:
        ArgumentTypeError: data is not iterable.
        ArgumentError: an argument contradicts another, the state or itself.
    """
    if data is not None and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ArgumentTypeError(f"data is {data!r}; it must be iterable, or None with an epoch_length")
    for name, value in (("max_epochs", max_epochs), ("max_iters", max_iters), ("epoch_length", epoch_length)):
        check_count(name, value, 1, optional=True)
    if max_epochs is not None and max_iters is not None:
        raise ArgumentError(f"max_epochs ({max_epochs}) and max_iters ({max_iters}) exclude each other; give one")

    started = state.max_epochs is not None or state.max_iters is not None
    finished = is_done(state.iteration, epochs_completed, state.max_epochs, state.max_iters)
    # Counted in epochs before and in iterations now, or the other way round.
    other_unit = (max_iters is not None and state.max_epochs is not None) or (
        max_epochs is not None and state.max_iters is not None
    )
    if other_unit and (resuming or not finished):
        raise ArgumentError(
            "the run to continue is counted in "
            f"{'epochs' if state.max_epochs is not None else 'iterations'}; give "
            f"{'max_epochs' if state.max_epochs is not None else 'max_iters'}, or set engine.state.max_epochs and "
            "engine.state.max_iters to None to begin anew"
        )
    # A run cannot go on to less than it has done.
    if started and not other_unit:
        for name, asked, reached in (
            ("max_epochs", max_epochs, state.epoch),
            ("max_iters", max_iters, state.iteration),
        ):
            if asked is not None and asked < reached:
                raise ArgumentError(
                    f"{name} is {asked}, but the state has reached {reached}; give at least that, or set "
                    f"engine.state.{name} to None to begin anew"
                )
    if not begins_anew(state, max_epochs, max_iters, epochs_completed=epochs_completed, resuming=resuming):
        settled = _length_to_continue(state, data, length, epoch_length)
        is_pass = epoch_length is None and (epoch_was_pass or state.epoch_length is None)
        return RunTerms(False, is_pass, settled, max_epochs or state.max_epochs, max_iters or state.max_iters)
    settled = _length_to_begin(state, data, length, epoch_length)
    is_pass = epoch_length is None and data is not None
    return RunTerms(True, is_pass, settled, None if max_iters else (max_epochs or 1), max_iters)


def _length_to_begin(state: State, data: Any, length: int | None, epoch_length: int | None) -> int | None:
    if epoch_length is not None:
        return epoch_length
    if data is None:
        if state.epoch_length is None:
            raise ArgumentError("there is no data and no epoch_length; give one of them")
        return state.epoch_length
    return length or (state.epoch_length if data is state.dataloader else None)


def _length_to_continue(state: State, data: Any, length: int | None, epoch_length: int | None) -> int | None:
    if state.epoch_length is None:
        if epoch_length is None and data is None and state.dataloader is None:
            raise ArgumentError("the state has no epoch_length and there is no data; give one of them")
        return epoch_length or length
    if epoch_length is not None and epoch_length != state.epoch_length:
        raise ArgumentError(
            f"epoch_length is {epoch_length}, but the run to continue has {state.epoch_length}; leave it out, or begin "
            "anew"
        )
    # Other data than before, of unknown length: its epochs need not be as long as those of the first.
    foreign = data is not None and state.dataloader is not None and data is not state.dataloader
    if foreign and epoch_length is None and length is None:
        return None
    return state.epoch_length
