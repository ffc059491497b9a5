"""From the records of all ranks to whether the run hangs, who is behind and who is slow.

A `HangDetector` belongs to one monitor. It makes a `RankProgress` of each record and asks the functions of `hang`.
Besides the limits it keeps only which ranks were found slow, so that each is reported once. It reads no clock: the
monitor passes `age`, which gives the seconds since something was heard.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from allstep.diagnosis.hang import Hang, HangLimits, RankProgress, diagnose, longest_stays, overdue, stragglers
from allstep.diagnosis.record import RankRecord
from allstep.diagnosis.stacks import waits_in
from allstep.protocol.messages import Heartbeat

SUSPECT_S = 2.5
"""Seconds without a heartbeat after which a rank is suspected, where the others failed because of some rank."""

Age = Callable[[float], float]
"""Seconds since a time at which something was heard."""


class HangDetector:
    """The limits of a run, and the ranks that were slow in it."""

    def __init__(self, limits: HangLimits) -> None:
        self._limits = limits
        self._slow_now: dict[int, float] = {}
        self._slow_ever: dict[int, float] = {}

    @property
    def slow(self) -> list[tuple[int, float]]:
        """The ranks that were slow at any time, and how many times slower at the last."""
        return sorted(self._slow_ever.items())

    def hangs(self, records: Collection[RankRecord], age: Age, away: Collection[int] = ()) -> bool:
        """Whether the run hangs; `away` are ranks of nodes that are not heard from."""
        longest = longest_stays([record.heartbeat for record in records if record.heartbeat is not None])
        return overdue(_progress(records, age, away), self._limits, longest)

    def diagnose(self, records: Collection[RankRecord], age: Age) -> Hang:
        """Who is behind, once stacks were gathered."""
        ranks = _progress(records, age)
        return diagnose(ranks, self._limits) if ranks else Hang({}, "")

    def suspects(self, records: Collection[RankRecord], age: Age) -> Hang:
        """Who is behind, where others have failed because of a rank that did not report.

        It is a rank that is silent, or else one that waits for no other.
        """
        ranks = _progress(records, age)
        # Sooner than the limit for silence, since it is known that something is wrong.
        silent = [each for each in ranks if each.age > SUSPECT_S]
        working = [each for each in ranks if not each.waits]
        why = "no heartbeat for {:.1f} s: it is frozen (as by SIGSTOP), or holds the interpreter lock"
        if silent:
            return Hang({each.rank: why.format(each.age) for each in silent}, "")
        return diagnose(working, self._limits) if working else Hang({}, "")

    def new_stragglers(self, records: Iterable[RankRecord]) -> list[tuple[int, float]]:
        """Ranks that have become slow since the last call, and how many times slower than the others they are."""
        beating = [record for record in records if record.heartbeat and record.present]
        found = stragglers({record.rank: record.heartbeat.own_step for record in beating if record.heartbeat})
        new = [(rank, ratio) for rank, ratio in found.items() if rank not in self._slow_now]
        # A rank that recovers is forgotten here, so that it is reported again if it becomes slow again.
        self._slow_now = found
        self._slow_ever.update(found)
        return new


def _progress(records: Iterable[RankRecord], age: Age, away: Collection[int] = ()) -> list[RankProgress]:
    """The progress of each rank whose World is open and that is not on its way out with an exception."""
    return [
        RankProgress(
            heartbeat,
            age(record.heard),
            record.rank in away,
            record.stacks,
            heartbeat.waiting or (waits_in(record.stacks) if record.stacks else ""),
        )
        for record in records
        if record.present and (record.failed is None or record.only_seen)
        for heartbeat in (record.heartbeat or _before_the_first(record.rank),)
    ]


def _before_the_first(rank: int) -> Heartbeat:
    """Where a rank is that was let in and has sent no heartbeat yet."""
    return Heartbeat(rank, 0, 0, 0, 0, "startup", 0.0)
