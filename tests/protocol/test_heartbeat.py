"""Where a rank says that it is."""

from __future__ import annotations

import threading

import pytest

from allstep.protocol.heartbeat import RECENT, RankActivity


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def activity(clock: Clock) -> RankActivity:
    return RankActivity(clock)


def test_a_beat_says_section_and_how_long_ago_it_made_progress(activity: RankActivity, clock: Clock):
    activity.enter("data")
    clock.now += 3
    beat = activity.heartbeat(1, 2, 3)
    assert (beat.rank, beat.attempt, beat.number, beat.section, beat.seconds) == (1, 2, 3, "data", 3.0)


def test_entering_the_same_section_again_is_progress(activity: RankActivity, clock: Clock):
    activity.enter("step")
    clock.now += 3
    activity.enter("step")
    clock.now += 1
    beat = activity.heartbeat(0, 0, 1)
    assert beat.seconds == 1.0
    assert beat.longest["step"] == 3.0


def test_the_longest_stay_in_each_section_is_kept(activity: RankActivity, clock: Clock):
    for seconds in (1, 5, 2):
        activity.enter("step")
        clock.now += seconds
        activity.enter("data")
    assert activity.heartbeat(0, 0, 1).longest["step"] == 5.0


def test_a_section_as_a_with_block_gives_the_place_back(activity: RankActivity):
    activity.enter("handler")
    with activity.section("checkpoint"):
        assert activity.heartbeat(0, 0, 1).section == "checkpoint"
    assert activity.heartbeat(0, 0, 2).section == "handler"


def test_an_engine_inside_another_gives_the_outer_ones_place_back(activity: RankActivity):
    with activity.run("trainer"):
        activity.epoch, activity.iteration = 2, 30
        activity.enter("handler")
        with activity.run("evaluator"):
            assert activity.nested
            activity.epoch, activity.iteration = 1, 4
            activity.enter("evaluation")
            assert activity.heartbeat(0, 0, 1).engine == "evaluator"
        beat = activity.heartbeat(0, 0, 2)
        assert (beat.engine, beat.epoch, beat.iteration, beat.section) == ("trainer", 2, 30, "handler")
    assert activity.heartbeat(0, 0, 3).section == "idle"


def test_a_rank_says_what_it_waits_in(activity: RankActivity):
    activity.wait_began("all_reduce #3")
    assert activity.heartbeat(0, 0, 1).waiting == "all_reduce #3"
    activity.wait_ended()
    assert activity.heartbeat(0, 0, 2).waiting == ""


def test_meeting_the_peers_is_progress_in_a_section_that_does_not_change(activity: RankActivity, clock: Clock):
    clock.now += 50
    activity.wait_began("all_reduce #1")
    assert activity.heartbeat(0, 0, 1).seconds == 0.0
    clock.now += 7
    assert activity.heartbeat(0, 0, 2).seconds == 7.0
    activity.wait_ended()
    clock.now += 2
    beat = activity.heartbeat(0, 0, 3)
    assert (beat.section, beat.seconds, beat.waiting) == ("startup", 2.0, "")


def test_who_asked_hears_that_the_peers_were_met_and_not_that_they_were_not(activity: RankActivity):
    met: list[str] = []
    activity.when_met = lambda: met.append(activity.waiting or "not waiting any more")
    with pytest.raises(RuntimeError), activity.wait("all_reduce #1"):
        raise RuntimeError("Connection closed by peer")
    assert (met, activity.waiting) == ([], "")
    with activity.wait("all_reduce #2"):
        pass
    assert met == ["not waiting any more"]


def test_its_own_time_for_a_step_has_no_waiting_in_it(activity: RankActivity, clock: Clock):
    with activity.run("trainer"):
        for iteration in range(RECENT + 1):
            assert activity.heartbeat(0, 0, 1).own_step == 0.0  # not enough steps yet
            activity.step_begins(1, iteration)
            clock.now += 0.25
            activity.wait_began("gradients")
            clock.now += 10
            activity.wait_ended()
        assert activity.heartbeat(0, 0, 1).own_step == 0.25


def test_only_recent_steps_count(activity: RankActivity, clock: Clock):
    with activity.run("trainer"):
        for seconds in [9.0] * 30 + [0.5] * (RECENT + 1):
            activity.step_begins(1, 1)
            clock.now += seconds
        assert activity.heartbeat(0, 0, 1).own_step == 0.5


def test_it_may_be_read_from_another_thread_at_any_moment(activity: RankActivity):
    stop = threading.Event()
    problems: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                activity.heartbeat(0, 0, 1)
            except BaseException as error:
                problems.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(20_000):
        with activity.run("trainer"), activity.section(f"section {number % 500}"):
            activity.step_begins(1, number)
    stop.set()
    thread.join()
    assert not problems


def test_a_forward_pass_without_its_backward_pass_is_told_by_iteration(activity: RankActivity):
    model, other = 1, 2
    for iteration in (1, 2, 3):
        activity.step_begins(1, iteration)
        activity.forward_ends(model)
        activity.forward_ends(other)
        assert activity.heartbeat(0, 0, 1).left_out == (2 if iteration == 3 else 0)  # it may still come
        activity.backward_begins(other)
        if iteration != 2:
            activity.backward_begins(model)
    assert activity.heartbeat(0, 0, 1).left_out == 2


def test_one_left_out_in_the_last_step_is_told_once_the_rank_waits_elsewhere(activity: RankActivity):
    activity.step_begins(1, 4)
    activity.forward_ends(1)
    with activity.wait("buffers"):
        assert activity.left_out == 0
    with activity.wait("agreement"):
        assert activity.left_out == 4


def test_the_most_backward_passes_of_a_module_in_an_iteration_are_told(activity: RankActivity):
    for iteration, passes in ((1, 3), (2, 5), (3, 2)):
        activity.step_begins(1, iteration)
        for _ in range(passes):
            activity.backward_begins(1)
        activity.backward_begins(2)
    assert activity.heartbeat(0, 0, 1).most_passes == 5
