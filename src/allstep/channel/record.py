"""What a service knows of one rank, and what that amounts to.

Contract: the hub keeps one `Record` per rank and notes in it what comes, each with the order and the time (on the
service's own clock) at which it came. `account` is a pure function of a record: what became of the rank, in words.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum

from allstep.channel.arrival import Arrival
from allstep.channel.ending import WorkerEnd, after_another, describe, exit_status
from allstep.channel.messages import Beat, Failure
from allstep.exit_codes import HANG, PEER_LOST, PREEMPTED, USER_ERROR


class Kind(StrEnum):
    """What became of a rank."""

    SIGNAL = "signal"
    ERROR = "error"
    EXIT = "exit"
    LOST = "lost"
    NODE_LOST = "node lost"
    SERVICE_LOST = "service lost"
    EARLY = "left early"
    HANG = "hang"
    DERIVED = "derived"
    ORDERED = "left on order"
    KILLED = "killed"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Moment:
    """When something came: its place in the order of all that came, and the clock's seconds."""

    order: int
    at: float


@dataclass(slots=True)
class Record:
    """One rank. `failed`, `ended`, ... say when what stands beside them came."""

    rank: int
    arrival: Arrival | None = None
    beat: Beat | None = None
    beaten: float = 0.0
    failure: Failure | None = None
    failed: Moment | None = None
    end: WorkerEnd | None = None
    ended: Moment | None = None
    lost: Moment | None = None
    lost_why: str = ""
    node_lost: bool = False
    bye: Moment | None = None
    ordered: Moment | None = None
    hung: Moment | None = None
    hung_why: str = ""
    awaited: str = ""
    stacks: str = ""
    trace: str = ""

    @property
    def present(self) -> bool:
        """Whether its World is open, as far as is known."""
        return self.arrival is not None and not (self.bye or self.ended or self.lost)

    @property
    def host(self) -> str:
        """Where it runs, if that is known."""
        return self.arrival.host if self.arrival else ""


@dataclass(frozen=True, slots=True)
class Account:
    """What became of one rank. `what` is a clause about it, `status` the exit status that it stands for.

    `order` is the place of the news in the order of arrival. `output` is the last text on its standard error.
    """

    rank: int
    kind: Kind
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


def account(record: Record, *, supervised: bool) -> Account:
    """What became of a rank, as far as is known now.

    Args:
        record: what is known.
        supervised: the end of its process will be known, so a closed connection alone says little.
    """
    kind, what, status, moment = _judge(record, supervised)
    arrival, beat, failure = record.arrival, record.beat, record.failure
    place = failure or beat
    return Account(
        rank=record.rank,
        kind=kind,
        what=what,
        status=status,
        order=moment.order if moment else 0,
        host=record.host,
        pid=arrival.pid if arrival else 0,
        device=(failure.device if failure else "") or (arrival.device_type if arrival else ""),
        epoch=place.epoch if place else 0,
        iteration=place.iteration if place else 0,
        section=place.section if place else "",
        waiting=beat.waiting if beat else "",
        traceback=failure.traceback if failure else "",
        output=record.end.stderr if record.end else "",
        note=record.end.note if record.end else "",
        stacks=record.stacks,
        trace=record.trace,
    )


_Judgement = tuple[Kind, str, int, Moment | None]


def _judge(record: Record, supervised: bool) -> _Judgement:
    if record.failure is not None:
        return _by_failure(record, record.failure)
    left = record.ended or record.lost
    if record.ordered is not None and left is not None and record.ordered.order < left.order:
        if record.end is not None and record.end.returncode == -signal.SIGKILL:
            return Kind.KILLED, "did not leave when it was told to, and was killed", PEER_LOST, left
        return Kind.ORDERED, "left when it was told to", PEER_LOST, left
    if record.hung is not None:
        return Kind.HANG, record.hung_why, HANG, record.hung
    if record.end is not None:
        return _by_end(record, record.end, record.ended)
    if record.node_lost:
        return Kind.NODE_LOST, record.lost_why, PEER_LOST, record.lost
    if record.bye is not None:
        return Kind.FINISHED, "closed its World", 0, record.bye
    if record.lost is not None:
        what = (
            f"let go of its connection to the service ({record.lost_why}), and its process goes on"
            if supervised
            else "is gone: its process was killed, or ended without closing its World"
        )
        return Kind.LOST, what, PEER_LOST, record.lost
    return Kind.RUNNING, "had not failed" if record.arrival else "had not come to init", 0, None


def _by_failure(record: Record, failure: Failure) -> _Judgement:
    status = USER_ERROR
    if record.end is not None and record.end.returncode and not record.end.killed:
        status = exit_status(record.end.returncode)
    summary = failure.message.strip().splitlines()
    what = f"{failure.kind}: {summary[0]}" if summary else failure.kind
    return (Kind.DERIVED if failure.derived else Kind.ERROR), what, status, record.failed


def _by_end(record: Record, end: WorkerEnd, moment: Moment | None) -> _Judgement:
    code = end.returncode
    if end.killed:
        return Kind.KILLED, "was killed by allstep", PEER_LOST, moment
    if code == PREEMPTED:
        return Kind.PREEMPTED, f"made room ({describe(code)})", code, moment
    if code in (HANG, PEER_LOST):
        return Kind.DERIVED, f"{describe(code)}, with which ranks leave when another one failed", code, moment
    if code == 0:
        if record.awaited:
            return Kind.EARLY, f"left early: it ended with exit code 0 {record.awaited}", USER_ERROR, moment
        if record.arrival is not None and record.bye is None:
            what = "left early: its process ended with exit code 0 while its World was open"
            return Kind.EARLY, what, USER_ERROR, moment
        return Kind.FINISHED, "finished without error", 0, record.bye or moment
    if after_another(end):
        return Kind.DERIVED, f"{describe(code)}, after a connection to it was lost", exit_status(code), moment
    return (Kind.SIGNAL if code < 0 else Kind.EXIT), describe(code), exit_status(code), moment
