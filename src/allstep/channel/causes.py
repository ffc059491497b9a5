"""Which end is the cause of the others: pure functions.

Contract: from the records of all ranks, `due` says when there is enough to judge, and `judge` makes a `Case`: the
first cause, then every other rank in causal order. Ends rank by how far from the cause they usually are: death by
signal; an exception, an exit code, a process or node that is gone; leaving early; no progress; an error about another
rank's end. Among equals the first to arrive at the service counts; no wall clock takes part.

An error about another's end never closes the case by itself while a rank has not been heard of, but for at most
`PATIENCE` seconds. A rank that closed its World in order is a cause only when others could not go on without it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from allstep.channel.record import Account, Kind, Record, account
from allstep.exit_codes import USER_ERROR

SETTLE = 0.3
"""Seconds after the first cause within which another may come that stands before it."""

PATIENCE = 5.0
"""Seconds for which errors about another's end wait for that end to be known."""

UNEXPLAINED = 2.0
"""Seconds after which a closed connection counts, where the end of its process was expected and did not come."""

_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CAUSES = (Kind.SIGNAL, Kind.ERROR, Kind.EXIT, Kind.LOST, Kind.NODE_LOST, Kind.SERVICE_LOST, Kind.EARLY)
"""What an end can be that needs no other to explain it."""


@dataclass(frozen=True, slots=True)
class Case:
    """What happened: the first cause, and all other ranks in causal order.

    `explanation` says more of a hang, `slow` which ranks were slower than the others, and how many times.
    """

    cause: Account
    others: tuple[Account, ...]
    world_size: int
    attempt: int
    explanation: str = ""
    slow: tuple[tuple[int, float], ...] = ()

    @property
    def exit_code(self) -> int:
        """The status that the run ends with."""
        return self.cause.status


def due(records: Sequence[Record], *, supervised: bool) -> float | None:
    """When to judge, on the records' clock; None where nothing speaks of a failure."""
    causes, derived = [], []
    for record in records:
        if record.failed or record.ended or record.lost:
            kind = account(record, supervised=supervised).kind
            first = record.failed or record.ended or record.lost
            assert first is not None
            if kind in CAUSES:
                waits = UNEXPLAINED if kind is Kind.LOST and supervised else 0.0
                causes.append(first.at + waits)
            elif kind is Kind.DERIVED:
                derived.append(first.at)
    if not causes and not derived:
        return None
    heard = all(_accounted(record, supervised) for record in records)
    if causes:
        if heard and all(record.end is not None and record.end.returncode == 0 for record in records):
            return None  # each left without closing its World, and nobody was left waiting
        return min(causes) + (0.0 if heard else SETTLE)
    return min(derived) + (SETTLE if heard else PATIENCE)


def judge(
    records: Sequence[Record],
    *,
    supervised: bool,
    attempt: int,
    explanation: str = "",
    slow: Sequence[tuple[int, float]] = (),
) -> Case:
    """Choose the cause among all that is known.

    Args:
        records: of all ranks; something must have failed.
        supervised: the ends of processes are known from their supervisors.
        attempt: the present start.
        explanation: what is known of a hang besides.
        slow: ranks that were slow, and how many times slower.
    """
    accounts = [account(record, supervised=supervised) for record in records]
    causes = sorted((each for each in accounts if each.kind in CAUSES), key=_distance)
    cause = causes[0] if causes else _without_causes(accounts)
    return case_of(cause, accounts, attempt=attempt, explanation=explanation, slow=slow)


def case_of(
    cause: Account,
    accounts: Sequence[Account],
    *,
    attempt: int,
    explanation: str = "",
    slow: Sequence[tuple[int, float]] = (),
) -> Case:
    """A case with a cause that is known already."""
    others = sorted((each for each in accounts if each.rank != cause.rank), key=_distance)
    return Case(cause, tuple(others), len(accounts), attempt, explanation, tuple(slow))


def _without_causes(accounts: Sequence[Account]) -> Account:
    """Nobody failed by itself: somebody left, or is stuck, or nobody knows and the first to say so is named."""
    hung = [each for each in accounts if each.kind is Kind.HANG]
    stuck_alone = [each for each in hung if not each.waiting]
    left = sorted((each for each in accounts if each.kind is Kind.FINISHED), key=lambda each: each.order)
    if left and not stuck_alone:
        place = f" at epoch {left[0].epoch}, iteration {left[0].iteration}" if left[0].iteration else ""
        what = f"left early: it closed its World{place} while others still needed it"
        return replace(left[0], kind=Kind.EARLY, what=what, status=USER_ERROR)
    if hung:
        return min(stuck_alone or hung, key=lambda each: (each.epoch, each.iteration, each.rank))
    return min(accounts, key=_distance)


def _accounted(record: Record, supervised: bool) -> bool:
    return bool(record.failed or record.ended or record.bye or (record.lost and not supervised) or record.node_lost)


_FAR = {Kind.EARLY: 2, Kind.HANG: 3, Kind.DERIVED: 4, Kind.ORDERED: 5, Kind.KILLED: 5}


def _distance(each: Account) -> tuple[int, int, int]:
    """How far from the cause an end of this kind usually is, then the order in which it was heard of."""
    if each.kind is Kind.SIGNAL:
        far = 1 if each.status - 128 in _POLITE else 0
    elif each.kind in CAUSES:
        far = _FAR.get(each.kind, 1)
    else:
        far = _FAR.get(each.kind, 6)
    return far, each.order, each.rank
