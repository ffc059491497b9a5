"""The watchdog of a running hub: makes standings of its records, and asks the pure functions of `watchdog`.

Contract: the hub says with `driven` that its driver is alive. Time in which the driver did not run, because the whole
machine was suspended, is nobody's silence: what ranks said meanwhile has not been read yet.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from allstep.diagnosis.hang import Hang, Limits, RankProgress, diagnose, longest_stays, overdue, stragglers
from allstep.diagnosis.record import RankRecord
from allstep.diagnosis.stacks import waits_in
from allstep.protocol.messages import Beat

SUSPECT = 2.5
"""Seconds without a heartbeat after which a rank is suspected, where the others failed because of somebody."""

_STALLED = 3.0


class Watch:
    """Progress of all ranks."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._driven = clock()
        self._resumed = clock()
        self._named: dict[int, float] = {}
        self._ever: dict[int, float] = {}

    @property
    def slow(self) -> list[tuple[int, float]]:
        """The ranks that were slow at any time, and how many times slower at the last."""
        return sorted(self._ever.items())

    def now(self) -> float:
        """The clock."""
        return self._clock()

    def driven(self) -> None:
        """The driver runs."""
        now = self._clock()
        if now - self._driven > _STALLED:
            self._resumed = now
        self._driven = now

    def age(self, heard: float) -> float:
        """Seconds since something was heard, that count."""
        return self._clock() - max(heard, self._resumed)

    def hangs(self, records: Iterable[RankRecord], away: Collection[int]) -> bool:
        """Whether the run hangs."""
        records = list(records)
        longest = longest_stays([record.beat for record in records if record.beat is not None])
        return overdue(self._standings(records, away), self._limits, longest)

    def diagnose(self, records: Iterable[RankRecord]) -> Hang:
        """Who is behind, once stacks were gathered."""
        standings = self._standings(records, ())
        return diagnose(standings, self._limits) if standings else Hang({}, "")

    def suspects(self, records: Iterable[RankRecord]) -> Hang:
        """Who is behind, where others have failed because of somebody that did not report: the silent, or else those
        that wait for nobody.
        """
        standings = self._standings(records, ())
        quiet = [each for each in standings if each.age > SUSPECT]
        working = [each for each in standings if not each.waits]
        why = "no heartbeat for {:.1f} s: it is frozen (as by SIGSTOP), or holds the interpreter lock"
        if quiet:
            return Hang({each.rank: why.format(each.age) for each in quiet}, "")
        return diagnose(working, self._limits) if working else Hang({}, "")

    def new_stragglers(self, records: Iterable[RankRecord]) -> list[tuple[int, float]]:
        """Ranks that have become slow since the last call."""
        found = stragglers({record.rank: record.beat.own_step for record in records if record.beat and record.present})
        new = [(rank, ratio) for rank, ratio in found.items() if rank not in self._named]
        self._named = found
        self._ever.update(found)
        return new

    def _standings(self, records: Iterable[RankRecord], away: Collection[int]) -> list[RankProgress]:
        return [
            RankProgress(
                beat,
                self.age(record.beaten),
                record.rank in away,
                record.stacks,
                beat.waiting or (waits_in(record.stacks) if record.stacks else ""),
            )
            for record in records
            if record.present and (record.failed is None or record.only_seen)
            for beat in (record.beat or _before_the_first(record.rank),)
        ]


def _before_the_first(rank: int) -> Beat:
    """The place of a rank that was let in and has not beaten yet."""
    return Beat(rank, 0, 0, 0, 0, "startup", 0.0)
