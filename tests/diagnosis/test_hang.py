"""When a run hangs, who is behind, and who is slow: pure decisions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from allstep.diagnosis.hang import HangLimits, RankProgress, diagnose, longest_stays, overdue, stragglers
from allstep.diagnosis.record import ProcessActivity
from allstep.errors import ConfigurationError
from allstep.protocol.messages import Heartbeat

LIMITS = HangLimits.parse("step=10,data=20,handler=100,checkpoint=100,silence=5")


def at(
    rank: int, seconds: float = 0.0, *, section: str = "step", iteration: int = 7, waits: str = "", **more: Any
) -> RankProgress:
    beat = Heartbeat(rank, 0, 1, 1, iteration, section, seconds, waits, more.get("engine", "trainer"))
    seen = more.get("activity"), more.get("busy", math.inf)
    return RankProgress(beat, more.get("age", 0.0), more.get("away", False), "", waits, *seen)


def hangs(*ranks: RankProgress) -> bool:
    return overdue(ranks, LIMITS, {})


STOPPED, ASLEEP, BUSY, TRACED = (ProcessActivity(each) for each in ("stopped", "asleep", "busy", "traced"))


@pytest.mark.parametrize("section", ["startup", "idle", "step"])
def test_a_silent_rank_that_cannot_be_seen_or_is_stopped_is_frozen(section: str):
    assert hangs(at(0), at(1, age=6, section=section))
    assert hangs(at(0), at(1, age=6, section=section, activity=STOPPED, busy=4))
    assert not hangs(at(0), at(1, age=4, section=section, activity=STOPPED))


def test_a_silent_rank_that_is_busy_has_the_limit_of_its_section():
    assert not hangs(at(0), at(1, age=9999, section="startup", activity=BUSY, busy=1))
    assert not hangs(at(0), at(1, age=9, activity=BUSY, busy=1))
    assert hangs(at(0), at(1, age=11, activity=BUSY, busy=1))


def test_a_silent_rank_that_sleeps_is_frozen_where_its_section_has_a_limit():
    assert hangs(at(0), at(1, age=6, activity=ASLEEP))
    assert not hangs(at(0), at(1, age=9, activity=ASLEEP, busy=4))  # not for long enough
    assert not hangs(at(0), at(1, age=9999, section="startup", activity=ASLEEP))


def test_a_silent_rank_that_sleeps_and_holds_others_up_is_a_hang_in_the_end():
    waits = at(0, 50, waits="gradients")
    assert not hangs(waits, at(1, age=60, section="idle", activity=ASLEEP))
    held = [at(0, 150, waits="gradients"), at(1, age=150, section="idle", activity=ASLEEP)]
    assert hangs(*held)
    (why,) = diagnose(held, LIMITS).behind.values()
    assert "section idle" in why
    assert "its process sleeps, in a call that holds the interpreter lock" in why


def test_a_rank_that_a_debugger_holds_is_not_frozen():
    assert not hangs(at(0), at(1, age=9, activity=TRACED))


def test_progress_is_no_hang():
    assert not hangs(at(0, 9), at(1, 3))


def test_a_rank_that_stays_too_long_while_the_others_wait_for_it_is_a_hang():
    assert hangs(at(0, 11, waits="gradients"), at(1, 11))


def test_waiting_for_one_that_is_within_its_own_limit_is_none():
    assert not hangs(at(0, 50, waits="gradients"), at(1, 50, section="checkpoint"))
    assert not hangs(at(0, 50, waits="gradients"), at(1, 2, iteration=6))
    assert not hangs(at(0, 50), at(1, 50, section="handler"))
    assert hangs(at(0, 101, waits="gradients"), at(1, 101, section="checkpoint"))


def test_waiting_for_one_that_waits_itself_is_a_hang():
    assert hangs(at(0, 50, waits="gradients"), at(1, 50, section="handler", waits="all_reduce #1"))


def test_ranks_that_all_wait_in_different_places_need_no_limit_of_a_section():
    elsewhere = at(0, 12, section="handler", waits="agreement", engine="evaluator")
    assert hangs(elsewhere, at(1, 11, waits="agreement"), at(2, 11, waits="agreement"))
    assert not hangs(elsewhere, at(1, 9, waits="agreement"))  # not long enough
    assert not hangs(elsewhere, at(1, 9, iteration=6))  # one works
    assert not hangs(elsewhere, at(1, 50, waits="agreement", engine="evaluator", section="handler"))  # the same place
    assert not overdue([elsewhere, at(1, 11, waits="agreement")], HangLimits.parse("apart=off"), {})


def test_waiting_for_one_that_left_the_loop_is_a_hang_in_the_end():
    assert not hangs(at(0, 50, waits="gradients"), at(1, 60, section="idle"))
    assert hangs(at(0, 150, waits="gradients"), at(1, 150, section="idle"))


def test_being_idle_together_is_none():
    assert not hangs(at(0, 9999, section="idle"), at(1, 9999, section="idle"))


def test_a_loop_of_ones_own_may_take_its_time():
    assert not hangs(at(0, 99_999, section="startup"), at(1, 99_999, section="startup"))
    given = HangLimits.parse("startup=60")
    assert overdue([at(0, 61, section="startup")], given, {})
    assert not overdue([at(0, 59, section="startup")], given, {})


def test_waiting_in_a_run_for_a_rank_that_begins_none_is_a_hang_in_the_end():
    assert not hangs(at(0, 50, waits="agreement"), at(1, 60, section="startup"))
    assert hangs(at(0, 150, waits="agreement"), at(1, 150, section="startup"))


def test_ranks_that_all_wait_in_different_places_hang_when_apart_is_over():
    wide = HangLimits.parse("step=300,handler=300,silence=60,apart=20")
    apart = [at(0, 21, waits="gradients"), at(1, 22, waits="agreement")]
    assert overdue(apart, wide, {})
    assert not overdue([at(0, 19, waits="gradients"), at(1, 22, waits="agreement")], wide, {})
    assert not overdue([*apart, at(2, 25)], wide, {})  # this one works
    assert not overdue([at(0, 21, waits="gradients"), at(1, 22, waits="gradients")], wide, {})
    assert not overdue([at(0, 21, waits="main_first"), at(1, 22, waits="agreement")], wide, {})


def test_silence_is_a_hang_whatever_the_section_allows():
    assert hangs(at(0), at(1, section="checkpoint", age=6))
    assert not hangs(at(0), at(1, section="checkpoint", age=4))


def test_the_silence_of_a_node_is_not_its_ranks():
    assert not hangs(at(0), at(1, age=6, away=True))


def test_limits_are_learnt_between_their_bounds():
    limits = HangLimits.parse("step=5:100,data=50")
    assert limits.of("step", None) == 100
    assert limits.of("step", 0.1) == 5
    assert limits.of("step", 2.0) == 20
    assert limits.of("step", 50.0) == 100
    assert limits.of("data", 0.1) == 50


def test_limits_can_be_turned_off():
    assert HangLimits.parse("step=off,silence=off").of("step", None) == math.inf
    assert HangLimits.parse("silence=off").silence == math.inf
    assert HangLimits.parse("") == HangLimits()


@pytest.mark.parametrize(
    "text", ["stepp=3", "step", "step=", "step=-1", "step=0", "step=nan", "step=9:3", "silence=1:2"]
)
def test_limits_that_make_no_sense_are_named(text):
    with pytest.raises(ConfigurationError, match="limits"):
        HangLimits.parse(text)


def test_the_longest_stay_of_any_rank_counts():
    beats = [
        Heartbeat(0, 0, 1, 1, 1, "step", 0, longest={"step": 1, "data": 5}),
        Heartbeat(1, 0, 1, 1, 1, "step", 0, longest={"step": 3}),
    ]
    assert longest_stays(beats) == {"step": 3, "data": 5}


def behind(*ranks: RankProgress) -> set[int]:
    return set(diagnose(ranks, LIMITS).behind)


def test_the_silent_are_behind():
    assert behind(at(0, 50, waits="gradients"), at(1, 50, age=20), at(2, 50)) == {1}


def test_who_waits_for_nobody_is_behind():
    assert behind(at(0, 50, waits="gradients"), at(1, 50), at(2, 50, waits="gradients")) == {1}


def test_of_those_who_wait_for_nobody_the_least_far_are_behind():
    assert behind(at(0, 50, waits="gradients"), at(1, 50, iteration=5), at(2, 50, iteration=6)) == {1}


def test_without_any_word_of_waiting_the_least_far_are_behind():
    assert behind(at(0, 50), at(1, 50, iteration=6), at(2, 50)) == {1}


def test_ranks_that_wait_in_different_places_have_come_apart():
    hang = diagnose(
        [
            at(0, 50, waits="all_reduce #1", section="handler"),
            at(1, 50, waits="agreement"),
            at(2, 50, waits="agreement"),
        ],
        LIMITS,
    )
    assert set(hang.behind) == {0}
    assert "rank 0 waits in all_reduce #1" in hang.explanation
    assert "ranks 1-2 wait in agreement" in hang.explanation
    assert "coordinator=Alone()" in hang.explanation


def test_ranks_in_different_engines_have_come_apart():
    hang = diagnose([at(0, 50, engine="evaluator", waits="agreement"), at(1, 50, waits="agreement")], LIMITS)
    assert "Engine(step, coordinator=Alone())" in hang.explanation


def test_all_at_the_same_place_are_all_named():
    assert behind(at(0, 50, waits="gradients"), at(1, 50, waits="gradients")) == {0, 1}


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({0: 0.1, 1: 0.1, 2: 0.16}, {2: 1.6}),
        ({0: 0.1, 1: 0.1, 2: 0.14}, {}),
        ({0: 0.1, 1: 0.2}, {1: 2.0}),
        ({0: 0.1, 1: 0.0}, {}),
        ({0: 0.1}, {}),
        ({}, {}),
        ({0: 0.0001, 1: 0.0003}, {}),
        ({0: 0.1, 1: 0.1, 2: 0.1, 3: 0.5, 4: 0.5}, {3: 5.0, 4: 5.0}),
    ],
)
def test_stragglers_take_one_and_a_half_times_the_median_of_the_others(own, found):
    assert stragglers(own) == pytest.approx(found)
