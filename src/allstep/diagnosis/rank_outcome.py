"""From what is known of one rank to what became of it: pure functions.

A monitor asks for the `RankOutcome` of a `RankRecord` at any moment, and again when more is known. `root_cause` ranks
outcomes, and `report` says them in words.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum

from allstep.diagnosis.record import Moment, RankRecord
from allstep.exit_codes import HANG, PEER_LOST, PREEMPTED, USER_ERROR
from allstep.protocol.last_words import after_another
from allstep.protocol.messages import Failure
from allstep.protocol.worker_exit import WorkerExit, describe, exit_status


class OutcomeKind(StrEnum):
    """What became of a rank.

    SIGNAL: killed by a signal. ERROR: an exception of its own. EXIT: a non-zero exit code. LOST, NODE_LOST: its
    connection, or its node, is gone. SERVICE_LOST: its node lost the head. EARLY: it left while others needed it. HANG:
    it made no progress. SEEN: an exception that it may have caught. DERIVED: an error about another rank's end.
    ORDERED: it left when it was told to. KILLED: by allstep. PREEMPTED: it saved and left with exit code 85. FINISHED:
    without error. RUNNING: it had not ended.
    """

    SIGNAL = "signal"
    ERROR = "error"
    EXIT = "exit"
    LOST = "lost"
    NODE_LOST = "node lost"
    SERVICE_LOST = "service lost"
    EARLY = "left early"
    HANG = "hang"
    SEEN = "seen"
    DERIVED = "derived"
    ORDERED = "left on order"
    KILLED = "killed"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """What became of one rank.

    Attributes:
        kind: which of the ends it is.
        what: a clause about it, to follow "rank 3".
        status: the exit status that it stands for.
        order: when the news came, as a place in the order of arrival; 0 where none came.
        host, pid, device: where it ran.
        epoch, iteration, section, waiting: where it was: in its exception, else in its last heartbeat.
        traceback: of its exception.
        output: the last text on its standard error.
        note: a further clause.
        stacks, trace: of its threads and of torch's collectives, where they were gathered.
    """

    rank: int
    kind: OutcomeKind
    what: str
    status: int
    order: int = 0
    host: str = ""
    pid: int = 0
    device: str = ""
    epoch: int = 0
    iteration: int = 0
    section: str = ""
    waiting: str = ""
    traceback: str = ""
    output: str = ""
    note: str = ""
    stacks: str = ""
    trace: str = ""


_BY_EXCEPTION = (OutcomeKind.ERROR, OutcomeKind.SEEN, OutcomeKind.DERIVED)
"""What an exception explains. Beside any other end, the rank's exception is only a note."""


def outcome_of(record: RankRecord, *, supervised: bool) -> RankOutcome:
    """What became of a rank, as far as is known now.

    Args:
        record: what is known.
        supervised: the end of its process will be known, so a closed connection alone says little.
    """
    kind, what, status, moment = judgement(record, supervised=supervised)
    registration, heartbeat, failure = record.registration, record.heartbeat, record.failure
    explains = kind in _BY_EXCEPTION
    place = failure if failure and explains else heartbeat
    return RankOutcome(
        rank=record.rank,
        kind=kind,
        what=what,
        status=status,
        order=moment.order if moment else 0,
        host=record.host,
        pid=registration.pid if registration else 0,
        device=(failure.device if failure else "") or (registration.device_type if registration else ""),
        epoch=place.epoch if place else 0,
        iteration=place.iteration if place else 0,
        section=place.section if place else "",
        waiting=heartbeat.waiting if heartbeat and place is heartbeat else "",
        traceback=failure.traceback if failure else "",
        output=record.end.stderr if record.end else "",
        note="; ".join(filter(None, (_known_by_its_node(record), "" if explains else _note(failure)))),
        stacks=record.stacks,
        trace=record.trace,
    )


Judgement = tuple[OutcomeKind, str, int, Moment | None]
"""What became of a rank: its kind, a clause, the exit status that it stands for, and when that was heard of."""


def judgement(record: RankRecord, *, supervised: bool) -> Judgement:
    """What became of a rank, as far as is known now: the heart of `outcome_of`.

    The order of the questions matters. A rank's own exception says more than how its process ended; its end after an
    order to leave says nothing of it; and an exception that it may have caught counts only where nothing better does.
    """
    failure, end, left = record.failure, record.end, record.left
    if failure is not None and (failure.leaving or _ended_of_it(record, supervised)):
        return _by_failure(record, failure, OutcomeKind.ERROR)
    if record.ordered is not None and left is not None and record.ordered.order < left.order:
        return _by_order(end, left)
    # Before how its process ended: a rank that hangs is killed in the end, which says nothing.
    if record.hung is not None:
        return OutcomeKind.HANG, record.hung_why, HANG, record.hung
    if end is not None and not (end.killed and failure):
        return _by_end(record, end, record.ended)
    if record.node_lost:
        return OutcomeKind.NODE_LOST, record.lost_why, PEER_LOST, record.lost
    # A process closes its connections when it ends, so a connection's end matters only where the process' is unknown.
    if record.lost is not None and end is None:
        return _by_loss(record, supervised)
    if failure is not None:
        return _by_failure(record, failure, OutcomeKind.SEEN)
    if record.goodbye is not None and record.left_open and record.awaited:
        what = f"left early: it ended with its World open {record.awaited}"
        return OutcomeKind.EARLY, what, USER_ERROR, record.goodbye
    if record.goodbye is not None:
        what = "ended with its World open" if record.left_open else "closed its World"
        return OutcomeKind.FINISHED, what, 0, record.goodbye
    return OutcomeKind.RUNNING, "had not failed" if record.registration else "had not come to init", 0, None


def _ended_of_it(record: RankRecord, supervised: bool) -> bool:
    """Whether an exception that was only seen is the best explanation of how the rank ended."""
    end = record.end
    if end is not None:
        # Those three codes are given by allstep itself, for reasons of other ranks.
        return end.returncode > 0 and end.returncode not in (HANG, PEER_LOST, PREEMPTED)
    return bool(record.awaited or (record.lost and not supervised and not record.node_lost))


def _by_failure(record: RankRecord, failure: Failure, kind: OutcomeKind) -> Judgement:
    # Before its process has ended, the status is what an uncaught exception gives.
    status = USER_ERROR
    if record.end is not None and record.end.returncode and not record.end.killed:
        status = exit_status(record.end.returncode)
    return (OutcomeKind.DERIVED if failure.derived else kind), _in_a_line(failure), status, record.failed


def _in_a_line(failure: Failure) -> str:
    summary = failure.message.strip().splitlines()
    return f"{failure.kind}: {summary[0]}" if summary else failure.kind


def _by_order(end: WorkerExit | None, left: Moment) -> Judgement:
    """The end of a rank that had been ordered to leave, which it may have done in another way than it was told."""
    if end is not None and end.killed:
        return OutcomeKind.KILLED, "did not leave when it was told to, and was killed", PEER_LOST, left
    if end is not None and end.returncode == PREEMPTED:
        return OutcomeKind.PREEMPTED, f"was preempted ({describe(PREEMPTED)})", PREEMPTED, left
    # SIGABRT is how a communication library ends a process whose peers are gone; other signals are its own crash.
    if end is not None and end.returncode < 0 and end.returncode != -signal.SIGABRT:
        return OutcomeKind.SIGNAL, describe(end.returncode), exit_status(end.returncode), left
    return OutcomeKind.ORDERED, "left when it was told to", PEER_LOST, left


def _by_loss(record: RankRecord, supervised: bool) -> Judgement:
    what = (
        f"let go of its connection to the service ({record.lost_why}), and its process goes on"
        if supervised
        else "is gone: its process was killed, or ended without closing its World"
    )
    return OutcomeKind.LOST, what, PEER_LOST, record.lost


def _by_end(record: RankRecord, end: WorkerExit, moment: Moment | None) -> Judgement:
    code = end.returncode
    if end.killed:
        return OutcomeKind.KILLED, "was killed by allstep", PEER_LOST, moment
    if code == PREEMPTED:
        return OutcomeKind.PREEMPTED, f"was preempted ({describe(code)})", code, moment
    if code in (HANG, PEER_LOST):
        return OutcomeKind.DERIVED, f"{describe(code)}, with which ranks leave when another one failed", code, moment
    if code == 0:
        if record.awaited:
            return OutcomeKind.EARLY, f"left early: it ended with exit code 0 {record.awaited}", USER_ERROR, moment
        # Exit code 0 without a goodbye: the process ended in a way that runs no handlers of Python's, as by os._exit.
        if record.registration is not None and record.goodbye is None:
            what = "left early: its process ended with exit code 0 while its World was open"
            return OutcomeKind.EARLY, what, USER_ERROR, moment
        what = "ended with its World open" if record.left_open else "finished without error"
        return OutcomeKind.FINISHED, what, 0, record.goodbye or moment
    if after_another(end):
        return OutcomeKind.DERIVED, f"{describe(code)}, after a connection to it was lost", exit_status(code), moment
    return (OutcomeKind.SIGNAL if code < 0 else OutcomeKind.EXIT), describe(code), exit_status(code), moment


def _known_by_its_node(record: RankRecord) -> str:
    return (record.end.note if record.end else "") or record.remark


def _note(failure: Failure | None) -> str:
    return f"before that, {_in_a_line(failure)} left a run, which the script may have caught" if failure else ""
