"""What a service knows of one rank.

Contract: a hub's inquiry and a relay keep one `RankRecord` per rank and note in it what comes, each with the order and
the time (on the service's own clock) at which it came. `allstep.diagnosis.rank_outcome` says what became of the rank.

An exception that was only *seen* left a run, and the script may have caught it: it explains an end for which nothing
better is known, of this rank or another, and otherwise is a note. It is forgotten when the rank is known to go on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from allstep.protocol.messages import Beat, Failure
from allstep.protocol.registration import Registration
from allstep.protocol.worker_exit import WorkerExit


@dataclass(frozen=True, slots=True)
class Moment:
    """When something came: its place in the order of all that came, and the clock's seconds."""

    order: int
    at: float


@dataclass(slots=True)
class RankRecord:
    """One rank. `failed`, `ended`, ... say when what stands beside them came.

    `failed` is when its exception was first seen, which is its place among causes; `failing` when it was known to leave
    the World or the script.
    """

    rank: int
    arrival: Registration | None = None
    beat: Beat | None = None
    beaten: float = 0.0
    failure: Failure | None = None
    failed: Moment | None = None
    failing: Moment | None = None
    end: WorkerExit | None = None
    ended: Moment | None = None
    lost: Moment | None = None
    lost_why: str = ""
    node_lost: bool = False
    bye: Moment | None = None
    left_open: bool = False
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
    def leaves_by_itself(self) -> bool:
        """Whether it is on its way out with an exception of its own, so that it needs no order."""
        return self.failure is not None and not self.failure.derived

    def note_beat(self, beat: Beat, at: float) -> None:
        """A heartbeat came."""
        self.beat, self.beaten = beat, at

    def note_bye(self, moment: Moment, *, closed: bool) -> None:
        """It closed its World in order, or (`closed` false) its interpreter ends with the World open."""
        self.bye, self.left_open = moment, not closed
        if closed:
            self.forget_seen()

    def note_lost(self, why: str, moment: Moment) -> bool:
        """Its connection is over; whether that says anything: not after a goodbye."""
        says = self.lost is None and self.bye is None
        if says:
            self.lost, self.lost_why = moment, why
        return says

    def note_end(self, end: WorkerExit, moment: Moment) -> bool:
        """Its process ended; whether that is news."""
        is_news = self.end is None
        if is_news:
            self.end, self.ended = end, moment
        return is_news

    def note_failure(self, failure: Failure, moment: Moment) -> None:
        """An exception was reported. The first that is leaving stays; where it was seen before, so does its place."""
        known = self.failure
        if known is not None and (known.leaving or not failure.leaving):
            return
        if failure.leaving:
            self.failing = moment
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
        return self.failing or self.left or (self.bye if self.awaited else None)

    @property
    def left(self) -> Moment | None:
        """When its process or its connection was gone."""
        return self.ended or self.lost

    @property
    def host(self) -> str:
        """Where it runs, if that is known."""
        return self.arrival.host if self.arrival else ""
