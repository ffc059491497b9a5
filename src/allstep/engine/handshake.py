"""What ranks tell each other before a run begins, so that a difference is an error and not a hang.

Contract: every rank of a collective engine calls `meet` once at the start of each run. It raises the same error on all
of them when they are about to do different things, and gives all of them the same `Agreement` and epoch length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from allstep.coordination import LONGEST_WINDOW, Coordinator, Schema, Uneven, agree_length, check_schemas
from allstep.engine.agreed_batches import Agreement
from allstep.engine.run_plan import check_agreement
from allstep.errors import DataError, TermsError, UnevenDataError

_DEFAULT_LOOKAHEAD = 4


class Reduction(Protocol):
    """Something that is reduced over ranks at one of an engine's events."""

    def schema(self) -> Schema:
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
    schema: Schema = ()


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the ranks agreed at a run's start. `length` is that of a pass for all, None when a rank does not know."""

    agreement: Agreement
    length: int | None
    is_one_shot: bool


def meet(
    coordinator: Coordinator,
    hello: RunDescription,
    *,
    policy: Uneven,
    group_size: int,
    window: int | None,
    lookahead: int | None,
    needs_fillers: bool,
) -> Handshake:
    """Compare what all ranks are about to do and agree how.

    Raises:
        TermsError: ranks differ in a term; names it and each rank's value.
        ValueError: all ranks say the same, and it cannot be meant.
        MetricMismatchError: ranks differ in what they reduce; names metric, state and ranks.
        DataError: under "shortest" or "error" a rank has no batch at all, or no rank has one.
        UnevenDataError: under "error" ranks know that they have different numbers of batches.
    """
    said: list[RunDescription] = coordinator.gather(hello)
    _check_same([each.terms for each in said])
    check_agreement(policy, window, lookahead, group_size)
    check_schemas([each.schema for each in said])
    lengths = [each.length for each in said]
    length = agree_length(lengths, policy)
    if length == 0:
        empty = ", ".join(str(rank) for rank, n in enumerate(lengths) if n == 0)
        raise DataError(
            f"data is empty on rank {empty} of {len(lengths)}: give every rank at least one batch, or train with "
            "uneven='longest', in which a rank without data takes part at weight zero"
        )
    if policy == "error" and length is not None and len(set(lengths)) > 1:
        counts = ", ".join(f"rank {rank} has {n}" for rank, n in enumerate(lengths))
        raise UnevenDataError(
            f"ranks have different numbers of batches, and uneven='error' was given: {counts}. Give every rank the "
            "same number, or choose uneven='shortest' or 'longest'",
            counts=tuple(n or 0 for n in lengths),
        )
    longest = LONGEST_WINDOW if window is None else window
    if not all(each.is_declared for each in said):
        ahead = lookahead if lookahead is not None else max(_DEFAULT_LOOKAHEAD, group_size)
        longest = min(longest, ahead // (2 * group_size))
    agreement = Agreement(policy, group_size, max(longest, 1), longest > 0 and window != 1, needs_fillers)
    return Handshake(agreement, length, any(each.is_one_shot for each in said))


def _check_same(terms: list[Mapping[str, Any]]) -> None:
    for key in terms[0]:
        values = [each.get(key) for each in terms]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise TermsError(
                f"ranks are about to run different things: {key} is {shown}. Give every rank the same, or an engine "
                "that does not run on all ranks coordinator=Alone()"
            )
