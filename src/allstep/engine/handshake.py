"""What ranks tell each other before a run begins, so that a difference is an error and not a hang.

Contract: `Engine.run` calls `shake_hands` once at the start of each run, on every rank that has others or accumulates
gradients. It raises the same error on all ranks when they are about to do different things. Otherwise all of them come
away with the same `Handshake`: how they will agree, and how many batches a pass has.

The message is a `RunDescription`: the arguments of the run and where it stands, how long this rank's data is, and what
it reduces over ranks (its metrics). Ranks exchange it in one gather.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from allstep.coordination import LONGEST_WINDOW, MOST_DOUBLINGS, ComparedLine, agree_length, check_same
from allstep.data.compositions import is_one_shot, whole_dataset_of
from allstep.engine.batch_sizes import declared_counts
from allstep.engine.position import group_size_over, sampler_of
from allstep.engine.run import Agreement, Handshake, Run
from allstep.engine.run_plan import RunArguments, check_accumulation, check_agreement, check_precision, length_of
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
        length: batches in a pass of this rank's data as it says, None when it does not know.
        exact_length: the same where it is sure.
        is_declared: whether its batches need not be read to be counted.
        is_one_shot: whether its data is an iterator.
        schema: what it reduces over ranks at the engine's events.
        dealing: how the loader deals samples to ranks, if it is one of allstep.
        whole_dataset: what a plain DataLoader reads from end to end, so that ranks see whether all read the same.
        modules: names of the wrapped modules that are alive here.
    """

    terms: Mapping[str, Any]
    length: int | None
    exact_length: int | None
    is_declared: bool
    is_one_shot: bool
    schema: tuple[ComparedLine, ...] = ()
    dealing: Mapping[str, Any] | None = None
    whole_dataset: tuple[str, int] | None = None
    modules: frozenset[str] = frozenset()


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
    check_precision(run.modules, settings.precision)
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
    _check_dealing([each.dealing for each in said])
    _check_shared_batches(said, coordinator.data.sharing)
    _warn_of_whole_datasets([each.whole_dataset for each in said[:: coordinator.data.sharing]], coordinator.rank)
    if run.replicas is not None:
        run.replicas.keep(frozenset.intersection(*(each.modules for each in said)))
    length = _agreed_length([each.length for each in said], arguments)
    agreement = _agreement(
        arguments,
        group_size,
        window=1 if is_alone else arguments.window,
        needs_reading=not all(each.is_declared for each in said),
        needs_fillers=not run.skips_idle,
    )
    exact = agree_length([each.exact_length for each in said], arguments.uneven)
    return Handshake(agreement, length, exact, any(each.is_one_shot for each in said))


def _describe(
    run: Run, data: Any, arguments: RunArguments, group_size: int, schema: tuple[ComparedLine, ...]
) -> RunDescription:
    state, settings = run.state, run.settings
    terms = {
        "the engine's name": settings.name,
        **asdict(arguments),
        "idle": settings.idle,
        "accumulate": group_size,
        "precision": settings.precision,
        "audit": settings.audit,
        "state.epoch": state.epoch,
        "state.iteration": state.iteration,
        "state.epoch_length": state.epoch_length,
        "state.max_epochs": state.max_epochs,
        "state.max_iters": state.max_iters,
        "the event whose handlers are left": None if run.unfinished is None else run.unfinished.event.name,
        "what handlers sum over ranks": tuple(each.name for each in run.sums),
    }
    is_declared = settings.samples_in is None and declared_counts(data) is not None
    exact, _ = run.own_lengths
    sampler = sampler_of(data)
    dealing = None if sampler is None or run.coordinator.world_size == 1 else sampler.dealing()
    whole = None if run.coordinator.world_size == 1 else whole_dataset_of(data)
    modules = frozenset() if run.replicas is None else run.replicas.names
    return RunDescription(
        terms, length_of(data), exact, is_declared, is_one_shot(data), schema, dealing, whole, modules
    )


def _check_terms(terms: Sequence[Mapping[str, Any]]) -> None:
    for key in terms[0]:
        values = [each.get(key) for each in terms]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise TermsError(
                f"ranks are about to run different things: {key} is {shown}. Give every rank the same, or an engine "
                "that does not run on all ranks coordinator=Alone()"
            )


def _check_dealing(said: Sequence[Mapping[str, Any] | None]) -> None:
    """Raise TermsError where ranks deal out different samples: some would be taken twice and others not at all."""
    dealt = {rank: each for rank, each in enumerate(said) if each is not None}
    for key in next(iter(dealt.values()), {}):
        if len({each[key] for each in dealt.values()}) > 1:
            shown = ", ".join(f"rank {rank}: {each[key]!r}" for rank, each in dealt.items())
            raise TermsError(
                f"the loaders of the ranks deal out different samples: {key} is {shown}. Give every rank's loader the "
                "same dataset, sizes, seed and sampler"
            )


def _check_shared_batches(said: Sequence[RunDescription], sharing: int) -> None:
    """Raise TermsError where ranks that compute one batch together have data of different lengths."""
    for rank, own in enumerate(said):
        first = rank - rank % sharing
        if own.length != said[first].length:
            raise TermsError(
                f"ranks {first} to {first + sharing - 1} compute the same batches together, but rank {first} has "
                f"{said[first].length} of them and rank {rank} {own.length}. Give them the same data: make it with "
                "world.loader, or choose it by world.data_rank and world.data_size in place of rank and world_size"
            )


def _warn_of_whole_datasets(said: Sequence[tuple[str, int] | None], rank: int) -> None:
    """Say once where every rank reads the same dataset from end to end, as a plain DataLoader does."""
    first = said[0]
    if len(said) > 1 and first is not None and all(each == first for each in said) and rank == 0:
        warnings.warn(
            f"each of {len(said)} ranks reads all samples of the same dataset: a plain DataLoader with a {first[0]} "
            "does not deal them out; make it with world.loader(dataset, batch_size=..., shuffle=... or sampler=...)",
            stacklevel=2,
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
