"""What a monitor knows of one rank.

A hub and a relay keep one `RankRecord` per rank. They note in it what comes, each with its place in the order of
arrival and the time on the monitor's own clock. `rank_outcome` says what became of the rank.

An exception is *only seen* while it has left a run, or `init`, and nothing more is known: the script may have caught
it. It explains an end for which nothing better is known, of this rank or another. Otherwise it is a note in the report.
It is forgotten when the rank is known to go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from allstep.protocol.messages import Failure, Heartbeat
from allstep.protocol.registration import RankRegistration
from allstep.protocol.worker_exit import WorkerExit


@dataclass(frozen=True, slots=True)
class Moment:
    """When something came: its place in the order of all that came, and the clock's seconds."""

    order: int
    at: float


class ProcessActivity(StrEnum):
    """What the process of a rank that sends no heartbeat does, as its node's service reads it from the kernel.

    BUSY: it uses a processor or waits for a device. ASLEEP: it does neither, and is not stopped. STOPPED: as by
    SIGSTOP. TRACED: a debugger holds it.
    """

    BUSY = "busy"
    ASLEEP = "asleep"
    STOPPED = "stopped"
    TRACED = "traced"


@dataclass(slots=True)
class RankRecord:
    """One rank. A `Moment` says when the field beside it came, and is None where that has not come.

    Attributes:
        heard: when its last heartbeat came, on the monitor's clock.
        failed: when its exception was first seen, which is its place among causes.
        failing: when that exception was known to leave the World or the script.
        node_lost: whether `lost` is about its whole node.
        left_open: whether its goodbye said that the interpreter ends while the World is open.
        leaving_code: the exit status that its goodbye foretold; 0 where it foretold none.
        ordered: when it was ordered to leave.
        hung: when it was found to be behind, with a clause about it in `hung_why`.
        awaited: a clause about what others wait for it in, once it is known that it will not come.
        activity: what its process was last seen to do, when it was looked at.
        busy: when its process was last seen to be busy though it was silent, on the monitor's clock.
        remark: what its node knows of the reason for its failure.
        stacks: of its threads, as faulthandler writes them.
        trace: torch's record of its last collectives.
        groups: the same for comparing ranks; see `flight_records`.
    """

    rank: int
    registration: RankRegistration | None = None
    heartbeat: Heartbeat | None = None
    heard: float = 0.0
    failure: Failure | None = None
    failed: Moment | None = None
    failing: Moment | None = None
    end: WorkerExit | None = None
    ended: Moment | None = None
    lost: Moment | None = None
    lost_why: str = ""
    node_lost: bool = False
    goodbye: Moment | None = None
    left_open: bool = False
    leaving_code: int = 0
    ordered: Moment | None = None
    hung: Moment | None = None
    hung_why: str = ""
    awaited: str = ""
    activity: ProcessActivity | None = None
    busy: float = -math.inf
    remark: str = ""
    stacks: str = ""
    trace: str = ""
    groups: str = ""

    @property
    def present(self) -> bool:
        """Whether its World is open, as far as is known."""
        return self.registration is not None and not (self.goodbye or self.ended or self.lost)

    @property
    def leaves_by_itself(self) -> bool:
        """Whether it is on its way out with an exception of its own, so that it needs no order."""
        return self.failure is not None and not self.failure.derived

    def note_heartbeat(self, heartbeat: Heartbeat, at: float) -> None:
        """A heartbeat came."""
        self.heartbeat, self.heard = heartbeat, at

    def note_activity(self, activity: ProcessActivity, at: float) -> None:
        """Its process was looked at."""
        self.activity = activity
        if activity is ProcessActivity.BUSY:
            self.busy = at

    def note_goodbye(self, moment: Moment, *, closed: bool, code: int = 0) -> None:
        """It closed its World in order, or (`closed` false) its interpreter ends with the World open."""
        self.goodbye, self.left_open, self.leaving_code = moment, not closed, code
        if closed:  # a World that is closed in order shows that the exception was caught
            self.forget_seen()

    def note_lost(self, why: str, moment: Moment) -> bool:
        """Its connection is over; return whether that is news, which it is not after a goodbye."""
        is_news = self.lost is None and self.goodbye is None
        if is_news:
            self.lost, self.lost_why = moment, why
        return is_news

    def note_end(self, end: WorkerExit, moment: Moment) -> bool:
        """Its process ended; return whether that is news."""
        is_news = self.end is None
        if is_news:
            self.end, self.ended = end, moment
        return is_news

    def note_failure(self, failure: Failure, moment: Moment) -> None:
        """An exception was reported. The first that leaves the World or the script stays.

        Where the same one was seen before, the place where that was stays too: it is closer to the cause.
        """
        known = self.failure
        if known is not None and (known.leaving or not failure.leaving):
            return
        if failure.leaving:
            self.failing = moment
        # What leaves the script is mostly what was seen to leave a run before, with the place where that was.
        if known is not None and (known.kind, known.message) == (failure.kind, failure.message):
            self.failure = replace(failure, epoch=known.epoch, iteration=known.iteration, section=known.section)
        else:
            self.failure, self.failed = failure, moment

    def forget_seen(self) -> None:
        """The rank goes on after an exception that left a run."""
        if self.only_seen:
            self.failure = self.failed = None

    @property
    def only_seen(self) -> bool:
        """Whether its exception left a run, or `init`, and is not known to have left the World or the script."""
        return self.failure is not None and not self.failure.leaving

    @property
    def opened(self) -> Moment | None:
        """When something came that may be a failure, or follow from one; None where nothing did."""
        return self.failing or self.left or (self.goodbye if self.awaited else None)

    @property
    def left(self) -> Moment | None:
        """When its process or its connection was gone."""
        return self.ended or self.lost

    @property
    def host(self) -> str:
        """Where it runs, if that is known."""
        return self.registration.host if self.registration else ""
