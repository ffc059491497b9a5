"""Exceptions that left a run and may yet be caught, and ranks that end with their World open: what the hub makes of
them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.diagnosis.root_cause import CAUSE_WINDOW_S, DERIVED_WAIT_S
from allstep.monitor.service import Verdict
from allstep.protocol.messages import Failure, FailureCaught, Goodbye
from allstep.protocol.worker_exit import WorkerExit
from tests.monitor.driving import BOUND, Caller, serving, world


def fails(caller: Caller, *, leaving: bool, message: str = "bad batch", iteration: int = 7, **what: Any) -> None:
    text = f"Traceback (most recent call last):\nValueError: {message}\n"
    caller.say(Failure(caller.rank, 0, 1, "ValueError", message, text, 1, iteration, "step", leaving=leaving, **what))


def no_verdict(hub: Any) -> bool:
    hub.pass_time(4 * CAUSE_WINDOW_S)
    return not [event for event in hub.events if isinstance(event, Verdict)]


def beat_until_verdict(hub: Any, caller: Caller) -> None:
    deadline = time.monotonic() + BOUND
    while not [event for event in hub.events if isinstance(event, Verdict)] and time.monotonic() < deadline:
        caller.beat()
        hub.pass_time(0.2)


def test_an_exception_that_may_yet_be_caught_ends_nothing():
    with serving() as hub, world(hub) as (_, second):
        fails(second, leaving=False)
        assert no_verdict(hub)


def test_it_is_the_cause_where_it_was_first_seen_once_it_leaves_the_script():
    with serving() as hub, world(hub) as (_, second):
        fails(second, leaving=False)
        fails(second, leaving=True, iteration=0)
        cause = hub.verdict().cause
        assert (cause.rank, cause.kind, cause.iteration) == (1, OutcomeKind.ERROR, 7)


@pytest.mark.parametrize("supervised", [True, False])
def test_it_is_the_cause_when_others_fail_for_want_of_the_rank_that_cleans_up(supervised: bool):
    with serving(supervised=supervised) as hub, world(hub) as (first, second):
        fails(second, leaving=False)
        hub.pass_time(0.1)
        first.fail("RuntimeError", "Connection closed by peer", derived=True)
        assert hub.verdict().cause.rank == 1


def test_it_is_the_cause_when_the_process_ends_after_it():
    with serving() as hub, world(hub) as (_, second):
        fails(second, leaving=False)
        hub.pass_time(0.1)
        hub.service.worker_ended(WorkerExit(1, 1))
        assert hub.verdict().cause.kind is OutcomeKind.ERROR


def test_one_that_was_taken_back_is_no_cause_of_what_comes_later():
    with serving() as hub, world(hub) as (first, second):
        fails(second, leaving=False, message="out of memory")
        second.say(FailureCaught(1))
        hub.pass_time(0.1)
        fails(first, leaving=True, message="the true cause")
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.what) == (0, "ValueError: the true cause")


def test_one_that_may_be_caught_counts_less_than_another_ranks_failure():
    with serving() as hub, world(hub) as (first, second):
        fails(second, leaving=False, message="out of memory")
        hub.pass_time(0.1)
        fails(first, leaving=True, message="the true cause")
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.what) == (0, "ValueError: the true cause")
        assert (diagnosis.others[0].kind, diagnosis.others[0].what) == (OutcomeKind.SEEN, "ValueError: out of memory")


def test_a_rank_that_caught_one_is_still_watched():
    with serving(limits="silence=1.5") as hub, world(hub) as (first, second):
        second.beat()
        fails(second, leaving=False, message="out of memory")
        beat_until_verdict(hub, first)
        cause = hub.verdict().cause
        assert (cause.rank, cause.kind) == (1, OutcomeKind.HANG)
        assert "before that, ValueError: out of memory" in cause.note


def test_a_cause_that_errors_about_it_waited_for_is_judged_at_once():
    with serving(3) as hub, world(hub, 3) as (first, second, _):
        first.fail("RuntimeError", "Connection closed by peer", derived=True)
        hub.pass_time(0.5)
        fails(second, leaving=True)
        began = hub.clock()
        assert hub.verdict().cause.rank == 1
        assert hub.clock() - began < DERIVED_WAIT_S / 2


def test_a_rank_preempted_while_another_trains_on_is_the_cause():
    with serving() as hub, world(hub) as (first, second):
        second.say(Goodbye(1))
        second.close()
        hub.service.worker_ended(WorkerExit(1, 85))
        beat_until_verdict(hub, first)
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind, diagnosis.exit_code) == (1, OutcomeKind.EARLY, 85)


def test_ranks_preempted_one_after_the_other_have_not_failed():
    with serving() as hub, world(hub) as (first, second):
        for rank in (second, first):
            rank.say(Goodbye(rank.rank))
            rank.close()
            hub.service.worker_ended(WorkerExit(rank.rank, 85))
            assert no_verdict(hub)


def test_closing_the_world_takes_it_back():
    with serving() as hub, world(hub) as (first, second):
        fails(second, leaving=False)
        second.say(Goodbye(1))
        first.say(Goodbye(0))
        hub.pass_time(0.1)
        for rank in range(2):
            hub.service.worker_ended(WorkerExit(rank, 0))
        assert no_verdict(hub)


def test_ranks_that_gave_init_up_alike_may_open_a_world_again():
    with serving() as hub, world(hub) as ranks:
        for rank in ranks:
            fails(rank, leaving=False)
            rank.say(Goodbye(rank.rank, closed=False))
        assert no_verdict(hub)
        with world(hub) as again:
            for rank in again:
                rank.say(Goodbye(rank.rank))
        assert no_verdict(hub)


def test_a_second_exception_that_leaves_is_told_apart_from_the_first():
    with serving() as hub, world(hub) as (_, second):
        fails(second, leaving=False, message="caught")
        fails(second, leaving=True, message="not caught", iteration=9)
        cause = hub.verdict().cause
        assert (cause.what, cause.iteration) == ("ValueError: not caught", 9)


def test_a_rank_that_ended_with_its_world_open_is_the_cause_if_others_fail():
    with serving() as hub, world(hub) as (first, second):
        second.say(Goodbye(1, closed=False))
        second.close()
        hub.service.worker_ended(WorkerExit(1, 0))
        hub.pass_time(0.1)
        first.fail("RuntimeError", "Connection closed by peer", derived=True)
        cause = hub.verdict().cause
        assert (cause.rank, cause.kind) == (1, OutcomeKind.EARLY)
        assert "with its World open" in cause.what


def test_ranks_that_end_with_open_worlds_at_different_times_have_not_failed():
    with serving() as hub, world(hub) as (first, second):
        second.say(Goodbye(1, closed=False))
        second.close()
        hub.service.worker_ended(WorkerExit(1, 0))
        assert no_verdict(hub)
        first.say(Goodbye(0, closed=False))
        hub.service.worker_ended(WorkerExit(0, 0))
        assert no_verdict(hub)
