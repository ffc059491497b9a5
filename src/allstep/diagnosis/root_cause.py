"""Which end is the cause of the others: pure functions.

Contract: from the records of all ranks, `due` says when there is enough to judge, and `judge` makes a `Diagnosis`: the
first cause, then every other rank in causal order. Ends rank by how far from the cause they usually are: death by
signal; an exception, an exit code, a process or node that is gone; leaving early; no progress; an error about another
rank's end. Among equals the first to arrive at the service counts; no wall clock takes part. An exception that was
only seen to leave a run, and may have been caught, opens no case; in a case that something else opens it stands before
errors about another's end only.

An error about another's end never closes the case by itself while a rank has not been heard of, but for at most
`PATIENCE` seconds. A rank that closed its World in order, or made room, is a cause only when others could not go on
without it, or when it made room alone. What comes after the verdict may still show a cause of a kind that stands before
the one that was named: `revised` takes it in. The end of a rank that was ordered to leave is one only within `SETTLE`
of the order, or where no rank was known to have failed by itself: a rank that seems frozen may be writing a core dump.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from allstep.diagnosis.rank_outcome import Kind, RankOutcome, account, judgement
from allstep.diagnosis.record import RankRecord
from allstep.exit_codes import USER_ERROR

SETTLE = 0.3
"""Seconds after the first cause within which another may come that stands before it."""

PATIENCE = 5.0
"""Seconds for which errors about another's end wait for that end to be known."""

UNEXPLAINED = 2.0
"""Seconds after which a closed connection counts, where the end of its process was expected and did not come."""

ROOM = 600.0
"""Seconds that the others have to make room too, once one rank has, unless they are seen to go on training."""

_GOES_ON = 2.0  # seconds after a rank made room from which another's training is not what all did before they stopped
_TRAINING = ("data", "step", "evaluation")
_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CAUSES = (Kind.SIGNAL, Kind.ERROR, Kind.EXIT, Kind.LOST, Kind.NODE_LOST, Kind.SERVICE_LOST, Kind.EARLY)
"""What an end can be that needs no other to explain it."""

_GONE = (Kind.FINISHED, Kind.PREEMPTED, Kind.SEEN)  # what can be a cause where there is no other


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What happened: the first cause, and all other ranks in causal order.

    `explanation` says more of a hang, `slow` which ranks were slower than the others, and how many times.
    """

    cause: RankOutcome
    others: tuple[RankOutcome, ...]
    world_size: int
    attempt: int
    explanation: str = ""
    slow: tuple[tuple[int, float], ...] = ()

    @property
    def exit_code(self) -> int:
        """The status that the run ends with."""
        return self.cause.status


def due(records: Sequence[RankRecord], *, supervised: bool) -> float | None:
    """When to judge, on the records' clock; None where nothing speaks of a failure."""
    causes, derived = [], []
    for record in records:
        kind = judgement(record, supervised=supervised)[0]
        opened = record.opened
        if opened is None:
            continue
        if kind in CAUSES:
            causes.append(opened.at + _window(kind, supervised))
        elif kind is Kind.DERIVED:
            derived.append(opened.at)
    heard = all(_accounted(record, supervised) for record in records)
    if causes:
        if heard and all(record.end is not None and record.end.returncode == 0 for record in records):
            return None  # each left without closing its World, and nobody was left waiting
        settled = heard and not any(record.only_seen and not record.left for record in records)
        return min(causes) - (SETTLE if settled else 0.0)
    return min(derived) + (SETTLE if heard else PATIENCE) if derived else None


def made_room_alone(records: Sequence[RankRecord], now: float, *, supervised: bool) -> bool:
    """Whether a rank has made room, and the others are known to go on: ranks that make room stop together."""
    left = [record.ended.at for record in records if record.ended and _made_room(record, supervised)]
    return bool(left) and any(
        _trains_after(record, min(left) + _GOES_ON) or now > min(left) + ROOM
        for record in records
        if not (record.left or record.bye)
    )


def _made_room(record: RankRecord, supervised: bool) -> bool:
    return judgement(record, supervised=supervised)[0] is Kind.PREEMPTED


def _trains_after(record: RankRecord, at: float) -> bool:
    beat = record.beat
    return beat is not None and beat.section in _TRAINING and record.beaten - beat.seconds > at


def _window(kind: Kind, supervised: bool) -> float:
    """Seconds after an end within which something may come that stands before it."""
    if kind is not Kind.LOST:
        return SETTLE
    # Without a supervisor nothing that comes later stands before a connection that closed, and the launcher is about
    # to end the ranks that could print the report.
    return UNEXPLAINED + SETTLE if supervised else 0.0


def judge(
    records: Sequence[RankRecord],
    *,
    supervised: bool,
    attempt: int,
    explanation: str = "",
    slow: Sequence[tuple[int, float]] = (),
) -> Diagnosis:
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
    return diagnosis_of(cause, accounts, attempt=attempt, explanation=explanation, slow=slow)


def diagnosis_of(
    cause: RankOutcome,
    accounts: Sequence[RankOutcome],
    *,
    attempt: int,
    explanation: str = "",
    slow: Sequence[tuple[int, float]] = (),
) -> Diagnosis:
    """A case with a cause that is known already."""
    others = sorted((each for each in accounts if each.rank != cause.rank), key=_distance)
    return Diagnosis(cause, tuple(others), len(accounts), attempt, explanation, tuple(slow))


def revised(case: Diagnosis, records: Sequence[RankRecord], *, supervised: bool) -> Diagnosis:
    """The case after the verdict, with what has become of the ranks since."""
    before = case.cause
    accounts = [account(record, supervised=supervised) for record in records]
    now = accounts[before.rank]
    if now.kind in (before.kind, *CAUSES):
        cause = now
    elif now.kind in _GONE and before.kind in (Kind.EARLY, Kind.ERROR):
        cause = _as_cause(now)  # how it went on to leave
    else:
        cause = replace(before, output=now.output, note=now.note)
    follows = {record.rank for record in records if before.kind in CAUSES and _ended_on_order(record)}
    causes = [each for each in accounts if each.kind in CAUSES and each.rank not in follows]
    first = min(causes, key=_distance, default=cause)
    explanation = case.explanation
    if _distance(first)[0] < _distance(cause)[0]:
        cause, explanation = first, ""
    return diagnosis_of(cause, accounts, attempt=case.attempt, explanation=explanation, slow=case.slow)


def _ended_on_order(record: RankRecord) -> bool:
    """Whether a rank had been told to leave long enough for its end, a crash too, to follow from that.

    It tears down what others let go of meanwhile. A crash that came before the order is heard of within `SETTLE`: the
    system closes the connections of a process and reports its end at the same time, after any core dump.
    """
    ordered, ended = record.ordered, record.ended
    return ordered is not None and ended is not None and ended.at - ordered.at > SETTLE


def _without_causes(accounts: Sequence[RankOutcome]) -> RankOutcome:
    """Nobody is known to have failed by itself: somebody left, or an exception was seen, or somebody is stuck, or
    nobody knows and the first to say so is named.
    """
    hung = [each for each in accounts if each.kind is Kind.HANG]
    stuck_alone = [each for each in hung if not each.waiting]
    gone = [each for each in accounts if each.kind in _GONE]
    if gone and not stuck_alone:
        return _as_cause(min(gone, key=lambda each: each.order))
    if hung:
        return min(stuck_alone or hung, key=lambda each: (each.epoch, each.iteration, each.rank))
    return min(accounts, key=_distance)


def _as_cause(each: RankOutcome) -> RankOutcome:
    if each.kind is Kind.SEEN:
        return replace(each, kind=Kind.ERROR)
    place = f" at epoch {each.epoch}, iteration {each.iteration}" if each.iteration else ""
    others = "the others went on" if each.kind is Kind.PREEMPTED else "others still needed it"
    what = f"left early: it {each.what}{place} while {others}"
    return replace(each, kind=Kind.EARLY, what=what, status=each.status or USER_ERROR)


def _accounted(record: RankRecord, supervised: bool) -> bool:
    return bool(record.failed or record.ended or record.bye or (record.lost and not supervised) or record.node_lost)


_FAR = {Kind.EARLY: 2, Kind.HANG: 3, Kind.SEEN: 4, Kind.DERIVED: 5, Kind.ORDERED: 6, Kind.KILLED: 6}


def _distance(each: RankOutcome) -> tuple[int, int, int]:
    """How far from the cause an end of this kind usually is, then the order in which it was heard of."""
    if each.kind is Kind.SIGNAL:
        far = 1 if each.status - 128 in _POLITE else 0
    elif each.kind in CAUSES:
        far = _FAR.get(each.kind, 1)
    else:
        far = _FAR.get(each.kind, 7)
    return far, each.order, each.rank
