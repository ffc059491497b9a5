"""From what is heard of all ranks to at most one verdict; it has no sockets.

The hub reports what came, in the order in which it came, and calls `tick` when `deadline` has passed. The detector
keeps a `RankRecord` of each rank, has `allstep.diagnosis` judge them, and puts `Verdict`, `StragglerSeen` and
`AllEnded` into the events that it was given.

A *verdict* is the one decision that the run has failed, with a `Diagnosis` that names the first cause. It is final:
what comes later may change the diagnosis (`diagnosis`), but not that the ranks are ordered to leave.

The detector calls `ask_stacks` when it wants the stacks of all ranks: for a hang, or where ranks failed because of one
that has said nothing. It waits for them for `GATHER_S`, reads the stacks files of those that do not answer, and judges.
A hang is not judged while a rank waits for a person: at a debugger's prompt, or held by one from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from allstep.diagnosis.flight_records import compare, from_text
from allstep.diagnosis.hang import HangDetector, HangLimits, waits_for_a_person
from allstep.diagnosis.rank_outcome import OutcomeKind, judgement
from allstep.diagnosis.record import Moment, ProcessActivity, RankRecord
from allstep.diagnosis.root_cause import CAUSES, Diagnosis, due, judge, preempted_alone, revised
from allstep.monitor.driven_clock import DrivenClock
from allstep.monitor.own_stacks import read_stacks
from allstep.monitor.service import AllEnded, MonitorEvent, StragglerSeen, Verdict
from allstep.protocol.messages import Failure, Heartbeat, Stacks
from allstep.protocol.registration import RankRegistration
from allstep.protocol.worker_exit import WorkerExit

GATHER_S = 2.0
"""Seconds that ranks have to answer with their stacks."""

PATIENCE_S = 10.0
"""Seconds from one look at a rank that waits for a person to the next."""

_EXPLAIN = (*CAUSES, OutcomeKind.SEEN)
_SOON = 0.01  # seconds after which news is looked at, so that a thousand ends are not judged a thousand times


class FailureDetector:
    """The records of a world's ranks, and the way from them to a verdict."""

    def __init__(
        self,
        world_size: int,
        *,
        attempt: int,
        supervised: bool,
        limits: HangLimits,
        clock: DrivenClock,
        events: list[MonitorEvent],
        ask_stacks: Callable[[], None],
    ) -> None:
        self.records = {rank: RankRecord(rank) for rank in range(world_size)}
        self.furthest = (0, 0)
        self._attempt = attempt
        self._supervised = supervised
        self._hangs = HangDetector(limits)
        self._clock = clock
        self._events = events
        self._ask_stacks = ask_stacks
        self._stacks_files: dict[int, str] = {}
        self._order = 0
        self._look_at: float | None = None
        self._gather_until: float | None = None
        self._unanswered: set[int] = set()
        self._diagnosis: Diagnosis | None = None
        self._all_ended = False
        self._patient_until = -math.inf

    @property
    def undecided(self) -> bool:
        """Whether something is known that may still become a verdict."""
        return self._diagnosis is None and (self._look_at is not None or self._gather_until is not None)

    def deadline(self) -> float | None:
        """When `tick` is due."""
        return min((at for at in (self._look_at, self._gather_until) if at is not None), default=None)

    def tick(self) -> None:
        """Judge what is due."""
        now = self._clock.now()
        if self._gather_until is not None and now >= self._gather_until:
            self._judge_by_stacks()
        if self._look_at is not None and now >= self._look_at:
            self._look(now)

    # What the hub reports.

    def admitted(self, registration: RankRegistration, stacks_file: str) -> None:
        """A rank was let in: a new World of its begins."""
        self.records[registration.rank] = RankRecord(registration.rank, registration, heard=self._clock.now())
        self._stacks_files[registration.rank] = stacks_file

    def beat(self, heartbeat: Heartbeat) -> None:
        """A heartbeat came."""
        self.records[heartbeat.rank].note_heartbeat(heartbeat, self._clock.now())
        self.furthest = max(self.furthest, (heartbeat.epoch, heartbeat.iteration))

    def failed(self, failure: Failure) -> None:
        """A rank reported an exception; its first one that leaves the World or the script counts."""
        self.records[failure.rank].note_failure(failure, self._moment())
        self.furthest = max(self.furthest, (failure.epoch, failure.iteration))
        self._look_soon()

    def remarked(self, rank: int, text: str) -> None:
        """The node of a rank said what it knows of its failure."""
        self.records[rank].remark = text

    def caught(self, rank: int) -> None:
        """A rank caught what it had reported, and goes on."""
        self.records[rank].forget_seen()

    def seen(self, rank: int, activity: ProcessActivity) -> None:
        """The process of a rank was looked at."""
        self.records[rank].note_activity(activity, self._clock.now())

    def answered(self, stacks: Stacks) -> None:
        """A rank sent its stacks."""
        record = self.records[stacks.rank]
        record.stacks, record.trace, record.groups = stacks.text, stacks.trace, stacks.groups
        self._unanswered.discard(stacks.rank)
        if self._gather_until is not None and not self._unanswered:
            self._gather_until = self._clock.now()

    def said_goodbye(self, rank: int, *, closed: bool = True, code: int = 0) -> None:
        """A rank closed its World in order, or (`closed` false) its interpreter ends with the World open."""
        self.records[rank].note_goodbye(self._moment(), closed=closed, code=code)
        self._look_soon()

    def lost(self, rank: int, why: str, registration: RankRegistration | None = None) -> None:
        """A rank's connection closed; with its registration, where it had not been let in yet."""
        record = self.records[rank]
        if registration is not None:
            record.registration = registration
        if record.note_lost(why, self._moment()):
            self._look_soon()

    def is_lost(self, rank: int) -> bool:
        """Whether a rank's connection closed without a goodbye, and nothing is known of its process."""
        record = self.records.get(rank)
        return record is not None and record.lost is not None and record.end is None

    def node_lost(self, ranks: Collection[int], why: str) -> None:
        """A node is gone, with those of its ranks that had not ended.

        A rank that had closed its World is gone with it too where the end of its process was to be reported. Without a
        supervisor a node's service ends with the last of its ranks: a rank that was gone before is no loss of the node.
        """
        moment = self._moment()
        for rank in ranks:
            record = self.records.get(rank)
            if record is not None and not record.end and (self._supervised or not (record.goodbye or record.lost)):
                record.lost, record.node_lost, record.lost_why = record.lost or moment, True, why
        self._look_soon()

    def gone_with_service(self, rank: int, why: str) -> None:
        """The service of a node is gone, and with it most likely the node's only rank, whose end it did not tell."""
        record = self.records[rank]
        if not record.present:
            self.node_lost([rank], why)
            return
        record.remark = "its node's service ended with it, before it told how; the launcher's own lines may"
        self.lost(rank, why)

    def is_news(self, end: WorkerExit) -> bool:
        """Whether the end of a worker counts, and was not heard of before."""
        record = self.records[end.rank]
        counts = record.registration is not None and (record.left_open or not record.goodbye)
        return record.end is None and (self._supervised or counts)

    def ended(self, end: WorkerExit) -> None:
        """A worker's process ended. Without a supervisor that counts from its World's start to its close."""
        record = self.records[end.rank]
        if self.is_news(end) and record.note_end(end, self._moment()):
            # Without a supervisor this very service may be ended with the rank, within milliseconds.
            self._look_soon(_SOON if self._supervised else 0.0)
            # With all ends known nothing more will come, so there is nothing to wait for.
            if all(each.end is not None for each in self.records.values()):
                self._conclude()

    def awaited(self, ranks: Collection[int]) -> None:
        """Ranks wait in `init` for these: note those that will not come."""
        for rank in ranks:
            record = self.records[rank]
            if (record.end is not None or record.left_open) and not record.awaited:
                record.awaited = "and did not call init, where others wait for it"
                self._look_soon()

    def order_leave(self) -> tuple[int, ...]:
        """Ranks are ordered to leave now; return those that are not, since an exception of their own ends them."""
        spared = tuple(record.rank for record in self.records.values() if record.leaves_by_itself)
        now = self._moment()
        for rank, record in self.records.items():
            if record.end is None and record.ordered is None and rank not in spared:
                record.ordered = now
        return spared

    def watch_progress(self, away: Collection[int]) -> None:
        """Look for slow ranks and for a hang; `away` are the ranks of nodes that are not heard from."""
        if self._diagnosis is not None:
            return
        records = self._all()
        for rank, ratio in self._hangs.new_stragglers(records):
            self._events.append(StragglerSeen(rank, ratio))
        if self._gather_until is not None or due(records, supervised=self._supervised) is not None:
            return  # a failure is being judged already
        if preempted_alone(records, self._clock.now(), supervised=self._supervised):
            self._judge("")
        elif self._clock.now() >= self._patient_until and self._hangs.hangs(records, self._clock.age, away):
            self._gather_stacks()

    # What is known.

    def diagnosis(self) -> Diagnosis | None:
        """The diagnosis as it stands now, with what has become of the ranks since the verdict."""
        if self._diagnosis is None:
            return None
        return revised(self._diagnosis, self._all(), supervised=self._supervised)

    def ends(self) -> Mapping[int, WorkerExit]:
        """How workers ended, by rank."""
        return {rank: record.end for rank, record in self.records.items() if record.end is not None}

    def present(self) -> list[int]:
        """The ranks whose World is open, as far as is known."""
        return [rank for rank, record in self.records.items() if record.present]

    def _all(self) -> Sequence[RankRecord]:
        return list(self.records.values())

    def _moment(self) -> Moment:
        self._order += 1
        return Moment(self._order, self._clock.now())

    # The way to a verdict.

    def _look_soon(self, within: float = _SOON) -> None:
        if self._diagnosis is None:
            soon = self._clock.now() + within
            self._look_at = soon if self._look_at is None else min(self._look_at, soon)

    def _look(self, now: float) -> None:
        """Judge if there is enough to judge by."""
        self._look_at = None
        if self._diagnosis is not None or self._gather_until is not None:
            return
        records = self._all()
        at = due(records, supervised=self._supervised)
        if at is None:
            return
        if now < at:
            self._look_at = at
            return
        kinds = {judgement(record, supervised=self._supervised)[0] for record in records}
        if kinds.isdisjoint(_EXPLAIN) and any(record.present and not record.failed for record in records):
            self._gather_stacks()  # others gave up on a rank that has not said a word: see what it does
            return
        self._judge("")

    def _gather_stacks(self) -> None:
        self._gather_until = self._clock.now() + GATHER_S
        self._unanswered = set(self.present())
        for record in self.records.values():  # of an earlier suspicion that came to nothing
            record.stacks = record.trace = record.groups = ""
            if self._clock.age(record.heard) < GATHER_S:
                record.activity = None  # of a time at which it was silent
        self._ask_stacks()

    def _judge_by_stacks(self) -> None:
        """The stacks are in, or will not come: find who is behind, and judge."""
        self._gather_until = None
        for rank, record in self.records.items():
            if record.present and not record.stacks:
                record.stacks = read_stacks(self._stacks_files.get(rank, ""))
        records = self._all()
        # Meanwhile a rank may have failed, and a rank that was only slow may have gone on.
        failed = due(records, supervised=self._supervised) is not None
        if not failed and not self._hangs.hangs(records, self._clock.age):
            return  # it moves again
        if not failed and any(waits_for_a_person(record) for record in records if record.present):
            self._patient_until = self._clock.now() + PATIENCE_S
            return
        find = self._hangs.suspects if failed else self._hangs.diagnose
        hang = find(records, self._clock.age)
        moment = self._moment()
        for rank, why in hang.behind.items():
            self.records[rank].hung, self.records[rank].hung_why = moment, why
        recorded = compare({record.rank: from_text(record.groups) for record in records if record.groups})
        self._judge("; ".join(filter(None, (hang.explanation, recorded))))

    def _conclude(self) -> None:
        """Every worker has ended."""
        if self._diagnosis is None and due(self._all(), supervised=self._supervised) is not None:
            self._judge("")
        if not self._all_ended:
            self._all_ended = True
            self._events.append(AllEnded())

    def _judge(self, explanation: str) -> None:
        self._look_at = None
        if self._diagnosis is None:
            self._diagnosis = judge(
                self._all(),
                supervised=self._supervised,
                attempt=self._attempt,
                explanation=explanation,
                slow=self._hangs.slow,
            )
            self._events.append(Verdict(self._diagnosis))
