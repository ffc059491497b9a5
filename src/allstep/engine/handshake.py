"""What ranks tell each other before a run begins, so that a difference is an error and not a hang.

Contract: `Engine.run` calls `shake_hands` once at the start of each run, on every rank that has others or accumulates
gradients. It raises the same error on all ranks when they are about to do different things. Otherwise all of them come
away with the same `Handshake`: how they will agree, and how many batches a pass has.

The message is a `RunDescription`: the arguments of the run and where it stands, how long this rank's data is, and what
it reduces over ranks (its metrics). Ranks exchange it in one gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from allstep.coordination import LONGEST_WINDOW, MOST_DOUBLINGS, ComparedLine, agree_length, check_same
from allstep.engine.batch_sizes import declared_counts
from allstep.engine.position import group_size_over
from allstep.engine.run import Agreement, Handshake, Run
from allstep.engine.run_plan import RunArguments, check_accumulation, check_agreement, length_of
from allstep.errors import DataError, TermsError, UnevenDataError

_DEFAULT_LOOKAHEAD = 4
_MOST_LOOKAHEAD = 32
"""Batches to which the default lookahead may grow. Beyond, a vote costs less than one part in a thousand of a step."""


class Reduction(Protocol):
    """Something that is reduced over ranks at one of an engine's events."""

    def schema(self) -> Sequence[ComparedLine]:
        """What it reduces, the same on every rank."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What one rank says at a run's start.

    Attributes:
        terms: what must be the same on all ranks.
        length: batches in a pass of this rank's data, None when it does not know.
        is_declared: whether its batches need not be read to be counted.
        is_one_shot: whether its data is an iterator.
        schema: what it reduces over ranks at the engine's events.
    """

    terms: Mapping[str, Any]
    length: int | None
    is_declared: bool
    is_one_shot: bool
    schema: tuple[ComparedLine, ...] = ()


def shake_hands(run: Run, data: Any, arguments: RunArguments, *, reductions: Iterable[Reduction]) -> Handshake | None:
    """Agree with the other ranks on the coming run over `data`; None where there is nothing to agree on.

    Args:
        run: where this rank stands; not changed.
        data: what is to be run over.
        arguments: those of `Engine.run`.
        reductions: what is reduced at the engine's events.

    Raises:
        TermsError: ranks differ in a term; names it and each rank's value.
        ArgumentError: all ranks say the same, and it cannot be meant.
        MetricMismatchError: ranks differ in what they reduce; names metric, state and ranks.
        DataError: under "shortest" or "error" a rank has no batch at all, or no rank has one.
        UnevenDataError: under "error" ranks know that they have different numbers of batches.
    """
    coordinator, settings = run.coordinator, run.settings
    group_size = group_size_over(data, settings.accumulate)
    check_accumulation(run.modules, group_size)
    is_alone = coordinator.world_size == 1
    if is_alone:
        check_agreement(arguments.uneven, arguments.window, arguments.lookahead, group_size)
        if group_size == 1:
            return None
    schema = tuple(line for reduction in reductions for line in reduction.schema())
    said: list[RunDescription] = coordinator.gather(_describe(run, data, arguments, group_size, schema))
    # The terms are compared before anything else is judged, so that ranks which differ get one error, not one each.
    _check_terms([each.terms for each in said])
    check_agreement(arguments.uneven, arguments.window, arguments.lookahead, group_size)
    check_same([each.schema for each in said])
    length = _agreed_length([each.length for each in said], arguments)
    agreement = _agreement(
        arguments,
        group_size,
        window=1 if is_alone else arguments.window,
        needs_reading=not all(each.is_declared for each in said),
        needs_fillers=settings.idle == "filler",
    )
    return Handshake(agreement, length, any(each.is_one_shot for each in said))


def _describe(
    run: Run, data: Any, arguments: RunArguments, group_size: int, schema: tuple[ComparedLine, ...]
) -> RunDescription:
    state, settings = run.state, run.settings
    terms = {
        "the engine's name": settings.name,
        **asdict(arguments),
        "idle": settings.idle,
        "accumulate": group_size,
        "state.epoch": state.epoch,
        "state.iteration": state.iteration,
        "state.epoch_length": state.epoch_length,
        "state.max_epochs": state.max_epochs,
        "state.max_iters": state.max_iters,
        "the event whose handlers are left": None if run.unfinished is None else run.unfinished.event.name,
    }
    is_declared = settings.samples_in is None and declared_counts(data) is not None
    return RunDescription(terms, length_of(data), is_declared, hasattr(data, "__next__"), schema)


def _check_terms(terms: Sequence[Mapping[str, Any]]) -> None:
    for key in terms[0]:
        values = [each.get(key) for each in terms]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise TermsError(
                f"ranks are about to run different things: {key} is {shown}. Give every rank the same, or an engine "
                "that does not run on all ranks coordinator=Alone()"
            )


def _agreed_length(lengths: Sequence[int | None], arguments: RunArguments) -> int | None:
    length = agree_length(lengths, arguments.uneven)
    if length == 0:
        empty = ", ".join(str(rank) for rank, n in enumerate(lengths) if n == 0)
        raise DataError(
            f"data is empty on rank {empty} of {len(lengths)}: give every rank at least one batch, or train with "
            "uneven='longest', in which a rank without data takes part at weight zero"
        )
    if arguments.uneven == "error" and length is not None and len(set(lengths)) > 1:
        counts = ", ".join(f"rank {rank} has {n}" for rank, n in enumerate(lengths))
        raise UnevenDataError(
            f"ranks have different numbers of batches, and uneven='error' was given: {counts}. Give every rank the "
            "same number, or choose uneven='shortest' or 'longest'",
            counts=tuple(n or 0 for n in lengths),
        )
    return length


def _agreement(
    arguments: RunArguments, group_size: int, *, window: int | None, needs_reading: bool, needs_fillers: bool
) -> Agreement:
    """How far ahead ranks may look: exactly as far as was asked, or by default little at first and then more."""
    lookahead, doublings = arguments.lookahead, 0
    if not needs_reading:
        lookahead = None
    elif lookahead is None:
        lookahead = max(_DEFAULT_LOOKAHEAD, group_size)
        while doublings < MOST_DOUBLINGS and lookahead << (doublings + 1) <= _MOST_LOOKAHEAD:
            doublings += 1
    widest = LONGEST_WINDOW if window is None else window
    return Agreement(arguments.uneven, group_size, widest, lookahead, doublings, needs_fillers)
