"""Keeps the record of one attempt, from what the hub of its ranks knows.

Contract: who drives a `Hub` and has a `RunRecorder` makes one `RunWatch` for an attempt, calls `tick` at the latest
when `deadline` has passed, and `finish` when the attempt is over. Each tick is one look at the last heartbeat of each
rank. What is written of it is bounded by time and not by ranks: a line in `PERIOD_S` while the ranks get on, and one in
`STILL_S` while they do not, so that a reader can tell a run that stands still from one that nobody watches any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from allstep.diagnosis.report import cause_line
from allstep.diagnosis.root_cause import Diagnosis
from allstep.monitor.hub import Hub
from allstep.run_record.progress import IterationRate, Progress, look
from allstep.run_record.recorder import FailureSummary, RunRecorder

PERIOD_S = 5.0
STILL_S = 60.0

_LOOK_S = 1.0


class RunWatch:
    """The record of one attempt.

    Args:
        recorder: writes it.
        hub: of its ranks.
        world_size: how many there are.
        clock: seconds, never turned back.
    """

    def __init__(
        self, recorder: RunRecorder, hub: Hub, world_size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._recorder = recorder
        self._hub = hub
        self._world_size = world_size
        self._clock = clock
        self._look_at = clock()
        self._written_at = clock()
        self._written: Progress | None = None
        self._seen: Progress | None = None
        self._pace = IterationRate()
        self._rate: float | None = None
        self._have_arrived = False

    def deadline(self) -> float:
        """When `tick` is due, on the clock."""
        return self._look_at

    def tick(self) -> None:
        """Look at the ranks, and write down what is due."""
        now = self._clock()
        self._look_at = now + _LOOK_S
        self._look(now)
        seen = self._seen
        if seen is None:
            return
        if self._is_due(seen, now):
            self._write(seen, now)

    def _is_due(self, seen: Progress, now: float) -> bool:
        written = self._written
        if written is None or (written.iteration == 0 and seen.iteration > 0):  # it got going
            return True
        return now - self._written_at >= (STILL_S if seen == written else PERIOD_S)

    def finish(self) -> None:
        """The attempt is over: write down how far it came."""
        now = self._clock()
        self._look(now)
        if self._seen is not None and self._seen != self._written:
            self._write(self._seen, now)

    def _look(self, now: float) -> None:
        heartbeats = (self._hub.status(rank) for rank in range(self._world_size))
        self._seen = look(each for each in heartbeats if each is not None)
        if self._seen is not None:
            self._rate = self._pace.note(now, self._seen.iteration)
        if not self._have_arrived and len(registered := self._hub.registrations()) == self._world_size:
            self._have_arrived = True
            by_node = {each.node_rank: each.host for each in registered.values()}
            self._recorder.arrived([by_node[node] for node in sorted(by_node)])

    def _write(self, seen: Progress, now: float) -> None:
        self._recorder.progress(seen, self._rate)
        self._written, self._written_at = seen, now


def summary_of(diagnosis: Diagnosis, report: Path | None) -> FailureSummary:
    """The first cause, for the record; `report` is the file that has all of it."""
    cause = diagnosis.cause
    return FailureSummary(
        rank=cause.rank,
        what=cause_line(diagnosis),
        host=cause.host,
        epoch=cause.epoch,
        iteration=cause.iteration,
        report="" if report is None else str(report.absolute()),
    )
