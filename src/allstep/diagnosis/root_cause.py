"""Which of the ranks' ends caused the others: pure functions.

From the records of all ranks, `due` says when there is enough to judge by, and `judge` makes a `Diagnosis`: the first
cause, then every other rank in causal order. Ends are ordered by how far from the cause they usually are: death by
signal; an exception, an exit code, a process or node that is gone; leaving early; no progress; an error about another
rank's end. Among equals the first to reach the monitor counts. No wall clock takes part.

- An exception that was only seen, and may have been caught, is no reason to judge. Once there is another reason, it
  counts for more than errors about another rank's end, and for less than everything else.
- An error about another rank's end is not judged by itself while some rank has not been heard of, for at most
  `DERIVED_WAIT_S`: that rank's end is probably the cause.
- A rank that closed its World in order, or was preempted, is a cause only when others could not go on without it, or
  when it was preempted alone.
- What comes after the verdict may still show a cause that is closer than the one that was named; `revised` takes it in.
  The end of a rank that was ordered to leave is one only within `CAUSE_WINDOW_S` of the order, or where no rank was
  known to have failed by itself: a rank that seems frozen may be writing a core dump.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from allstep.diagnosis.rank_outcome import OutcomeKind, RankOutcome, judgement, outcome_of
from allstep.diagnosis.record import RankRecord
from allstep.exit_codes import USER_ERROR

CAUSE_WINDOW_S = 0.3
"""Seconds after the first cause within which one may come that is closer to the truth."""

DERIVED_WAIT_S = 5.0
"""Seconds for which errors about another rank's end wait for that end to be known."""

EXIT_WAIT_S = 2.0
"""Seconds after which a closed connection counts, where the end of its process was expected and did not come."""

END_WAIT_S = 0.2
"""The same without a supervisor: the node's service tells the end of a process that it can see at once, if at all."""

PREEMPTION_WAIT_S = 600.0
"""Seconds that the others have to be preempted too, once one rank was, unless they are seen to go on training."""

_GOES_ON_S = 2.0  # after a rank was preempted, from when on another's training is not what all did before they stopped
_TRAINING = ("data", "step", "evaluation")
_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CAUSES = (
    OutcomeKind.SIGNAL,
    OutcomeKind.ERROR,
    OutcomeKind.EXIT,
    OutcomeKind.LOST,
    OutcomeKind.NODE_LOST,
    OutcomeKind.SERVICE_LOST,
    OutcomeKind.EARLY,
)
"""What an end can be that needs no other to explain it."""

_GONE = (OutcomeKind.FINISHED, OutcomeKind.PREEMPTED, OutcomeKind.SEEN)  # what can be a cause where there is no other


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
        elif kind is OutcomeKind.DERIVED:
            derived.append(opened.at)
    all_known = all(_is_known(record, supervised) for record in records)
    if causes:
        if all_known and all(record.end is not None and record.end.returncode == 0 for record in records):
            return None  # each left without closing its World, and none was left waiting
        # Nothing more can come, so there is no reason to wait for it; an exception that was only seen may still leave.
        complete = all_known and not any(record.only_seen and not record.left for record in records)
        return min(causes) - (CAUSE_WINDOW_S if complete else 0.0)
    return min(derived) + (CAUSE_WINDOW_S if all_known else DERIVED_WAIT_S) if derived else None


def preempted_alone(records: Sequence[RankRecord], now: float, *, supervised: bool) -> bool:
    """Whether a rank was preempted and the others are known to go on: preempted ranks of a run stop together."""
    left = [record.ended.at for record in records if record.ended and _was_preempted(record, supervised)]
    return bool(left) and any(
        _trains_after(record, min(left) + _GOES_ON_S) or now > min(left) + PREEMPTION_WAIT_S
        for record in records
        if not (record.left or record.goodbye)
    )


def _was_preempted(record: RankRecord, supervised: bool) -> bool:
    return judgement(record, supervised=supervised)[0] is OutcomeKind.PREEMPTED


def _trains_after(record: RankRecord, at: float) -> bool:
    last = record.heartbeat
    return last is not None and last.section in _TRAINING and record.heard - last.seconds > at


def _window(kind: OutcomeKind, supervised: bool) -> float:
    """Seconds after an end within which a cause may come that is closer to the truth."""
    if supervised:
        return CAUSE_WINDOW_S + (EXIT_WAIT_S if kind is OutcomeKind.LOST else 0.0)
    # Without a supervisor nothing that comes later says more than the end of a process, and the launcher is about to
    # end the ranks that could print the report, or this very service.
    if kind in (OutcomeKind.SIGNAL, OutcomeKind.EXIT, OutcomeKind.EARLY):
        return 0.0
    return END_WAIT_S if kind is OutcomeKind.LOST else CAUSE_WINDOW_S


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
    outcomes = [outcome_of(record, supervised=supervised) for record in records]
    causes = sorted((each for each in outcomes if each.kind in CAUSES), key=_distance)
    cause = causes[0] if causes else _without_causes(outcomes)
    return diagnosis_of(cause, outcomes, attempt=attempt, explanation=explanation, slow=slow)


def diagnosis_of(
    cause: RankOutcome,
    outcomes: Sequence[RankOutcome],
    *,
    attempt: int,
    explanation: str = "",
    slow: Sequence[tuple[int, float]] = (),
) -> Diagnosis:
    """A diagnosis with a cause that is known already; the arguments are those of `judge`."""
    others = sorted((each for each in outcomes if each.rank != cause.rank), key=_distance)
    return Diagnosis(cause, tuple(others), len(outcomes), attempt, explanation, tuple(slow))


def revised(diagnosis: Diagnosis, records: Sequence[RankRecord], *, supervised: bool) -> Diagnosis:
    """The diagnosis after the verdict, with what has become of the ranks since."""
    before = diagnosis.cause
    outcomes = [outcome_of(record, supervised=supervised) for record in records]
    now = outcomes[before.rank]
    if now.kind in (before.kind, *CAUSES):
        cause = now
    elif now.kind in _GONE and before.kind in (OutcomeKind.EARLY, OutcomeKind.ERROR):
        cause = _as_cause(now)  # how it went on to leave
    else:
        cause = replace(before, output=now.output, note=now.note)
    follows = {record.rank for record in records if before.kind in CAUSES and _ended_on_order(record)}
    causes = [each for each in outcomes if each.kind in CAUSES and each.rank not in follows]
    first = min(causes, key=_distance, default=cause)
    explanation = diagnosis.explanation
    if _distance(first)[0] < _distance(cause)[0]:
        cause, explanation = first, ""
    return diagnosis_of(cause, outcomes, attempt=diagnosis.attempt, explanation=explanation, slow=diagnosis.slow)


def _ended_on_order(record: RankRecord) -> bool:
    """Whether a rank had been ordered to leave long enough before its end, a crash too, for that to be the reason.

    A rank that leaves takes down what others have closed meanwhile, and may crash in that. A crash that came before the
    order is heard of within `CAUSE_WINDOW_S`: the system closes the connections of a process and reports its end at the
    same time, after any core dump.
    """
    ordered, ended = record.ordered, record.ended
    return ordered is not None and ended is not None and ended.at - ordered.at > CAUSE_WINDOW_S


def _without_causes(outcomes: Sequence[RankOutcome]) -> RankOutcome:
    """The cause where no rank is known to have failed by itself.

    That is a rank that left, or had an exception that was only seen, or is stuck. Where there is none, it is the first
    that reported anything.
    """
    hung = [each for each in outcomes if each.kind is OutcomeKind.HANG]
    stuck_alone = [each for each in hung if not each.waiting]
    gone = [each for each in outcomes if each.kind in _GONE]
    if gone and not stuck_alone:
        return _as_cause(min(gone, key=lambda each: each.order))
    if hung:
        return min(stuck_alone or hung, key=lambda each: (each.epoch, each.iteration, each.rank))
    return min(outcomes, key=_distance)


def _as_cause(each: RankOutcome) -> RankOutcome:
    if each.kind is OutcomeKind.SEEN:
        return replace(each, kind=OutcomeKind.ERROR)
    place = f" at epoch {each.epoch}, iteration {each.iteration}" if each.iteration else ""
    others = "the others went on" if each.kind is OutcomeKind.PREEMPTED else "others still needed it"
    what = f"left early: it {each.what}{place} while {others}"
    return replace(each, kind=OutcomeKind.EARLY, what=what, status=each.status or USER_ERROR)


def _is_known(record: RankRecord, supervised: bool) -> bool:
    """Whether a rank has said or shown how it went, so that it need not be waited for."""
    return bool(record.failed or record.ended or record.goodbye or (record.lost and not supervised) or record.node_lost)


# By what rank_outcome's kinds usually follow from; causes that are not named here stand at 1.
_FAR = {
    OutcomeKind.EARLY: 2,
    OutcomeKind.HANG: 3,
    OutcomeKind.SEEN: 4,
    OutcomeKind.DERIVED: 5,
    OutcomeKind.ORDERED: 6,
    OutcomeKind.KILLED: 6,
}


def _distance(each: RankOutcome) -> tuple[int, int, int]:
    """How far from the cause an end of this kind usually is, then the order in which it was heard of."""
    if each.kind is OutcomeKind.SIGNAL:
        # A crash explains anything. A signal that asks to leave may have come from who cleans up, and an abort from a
        # library that lost a peer, where no last words tell.
        number = each.status - 128
        far = 1 if number in _POLITE or (number == signal.SIGABRT and not each.output) else 0
    elif each.kind in CAUSES:
        far = _FAR.get(each.kind, 1)
    else:
        far = _FAR.get(each.kind, 7)
    return far, each.order, each.rank
