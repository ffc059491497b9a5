"""From records to ranks that are behind or slow; the seconds are the test's."""

from __future__ import annotations

from typing import Any

from allstep.diagnosis.hang import SUSPECT_S, HangDetector, HangLimits
from allstep.diagnosis.record import Moment, RankRecord
from allstep.protocol.messages import Heartbeat
from tests.monitor.driving import registration

NOW = 100.0


def age(heard: float) -> float:
    return NOW - heard


def record(rank: int, *, heard: float = NOW, **heartbeat: Any) -> RankRecord:
    values = {"epoch": 1, "iteration": 7, "section": "step", "seconds": 0.0, **heartbeat}
    return RankRecord(rank, registration(rank, 3), Heartbeat(rank, 0, 1, **values), heard)


def detector(limits: str = "step=10,silence=15") -> HangDetector:
    return HangDetector(HangLimits.parse(limits))


def test_a_rank_whose_heartbeats_stopped_hangs_the_run():
    silent = record(1, heard=NOW - 16.0)
    assert detector().hangs([record(0), silent], age)
    assert list(detector().diagnose([record(0), silent], age).behind) == [1]


def test_a_rank_of_a_node_that_is_not_heard_from_is_not_silent():
    assert not detector().hangs([record(0), record(1, heard=NOW - 16.0, section="idle")], age, away=[1])


def test_a_rank_that_has_closed_its_world_cannot_hang():
    gone = record(1, heard=NOW - 60.0)
    gone.note_goodbye(Moment(1, NOW - 50.0), closed=True)
    assert not detector().hangs([record(0), gone], age)


def test_a_rank_that_was_let_in_and_has_said_nothing_is_in_startup():
    fresh = RankRecord(1, registration(1, 3), heard=NOW - 1.0)
    assert not detector().hangs([record(0), fresh], age)


def test_where_others_failed_a_short_silence_is_enough_to_suspect_a_rank():
    quiet = record(2, heard=NOW - SUSPECT_S - 0.5)
    found = detector().suspects([record(0, waiting="gradients"), record(1), quiet], age)
    assert found.behind == {
        2: "no heartbeat for 3 s: it is frozen (as by SIGSTOP), or in a call that holds the interpreter lock",
    }


def test_without_a_silent_rank_one_that_waits_for_no_other_is_suspected():
    found = detector().suspects([record(0, waiting="gradients"), record(1, seconds=30.0)], age)
    assert list(found.behind) == [1]


def test_a_slow_rank_is_new_once_and_again_after_it_recovered():
    watched = detector()
    even = [record(rank, own_step=0.1) for rank in range(3)]
    uneven = [*even[:2], record(2, own_step=0.3)]
    assert [rank for rank, _ in watched.new_stragglers(uneven)] == [2]
    assert watched.new_stragglers(uneven) == []
    assert watched.new_stragglers(even) == []
    assert [rank for rank, _ in watched.new_stragglers(uneven)] == [2]
    assert [rank for rank, _ in watched.slow] == [2]
