"""What a hub decides from what it hears, over real sockets; the ranks are sockets that the test speaks for."""

from __future__ import annotations

import itertools
import os
import socket
import time

import pytest

from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.monitor.own_stacks import make_stacks_file
from allstep.monitor.service import AllArrived, AllEnded, ConnectionLost, StragglerSeen, Verdict
from allstep.protocol.connection import Connection
from allstep.protocol.messages import AskStacks, Goodbye, Leave, Refused, Stacks, Welcome
from allstep.protocol.worker_exit import WorkerExit
from tests.monitor.driving import Caller, Driven, registration, serving, world


def the_cause(driven: Driven) -> tuple[int, OutcomeKind]:
    diagnosis = driven.verdict()
    return diagnosis.cause.rank, diagnosis.cause.kind


def test_ranks_go_on_when_all_are_there():
    with serving() as hub:
        first = Caller(hub, 0).come()
        hub.pass_time(0.1)
        assert not first.listen()
        second = Caller(hub, 1).come()
        first.hears(Welcome)
        second.hears(Welcome)
        hub.event(AllArrived)


def test_a_missing_rank_is_named():
    with serving(3) as hub:
        callers = [Caller(hub, rank, 3, patience=0.2).come() for rank in (0, 2)]
        for caller in callers:
            assert "1 of 3 ranks did not arrive within 0.2 s: 1;" in caller.hears(Refused).reason


def test_a_rank_that_comes_after_the_verdict_hears_the_same():
    with serving(3) as hub:
        Caller(hub, 0, 3, patience=0.1).come().hears(Refused)
        assert "ranks did not arrive" in Caller(hub, 1, 3).come().hears(Refused).reason


def test_both_processes_of_a_doubled_rank_are_named_and_nobody_waits():
    with serving() as hub:
        first = Caller(hub, registration=registration(1, pid=11)).come()
        second = Caller(hub, registration=registration(1, pid=12, host="b")).come()
        for caller in (first, second):
            reason = caller.hears(Refused).reason
            assert "two processes are rank 1" in reason
            assert "process 11 on a" in reason
            assert "process 12 on b" in reason


def test_differing_world_sizes_are_found_before_all_are_there():
    with serving(3) as hub:
        first, second = Caller(hub, 0, 3).come(), Caller(hub, 1, 2).come()
        for caller in (first, second):
            assert "disagree about world_size: 3 in process 100 on a, 2" in caller.hears(Refused).reason


def test_a_differing_configuration_is_named_with_each_ranks_value():
    with serving() as hub:
        callers = [
            Caller(hub, registration=registration(n, facts={"config.yaml": value})).come()
            for n, value in enumerate("ab")
        ]
        for caller in callers:
            assert "disagree about config.yaml (rank 0: 'a'; rank 1: 'b')" in caller.hears(Refused).reason


def test_a_process_that_takes_a_running_ranks_place_is_turned_away():
    with serving() as hub, world(hub) as ranks:
        stranger = Caller(hub, registration=registration(1, pid=999)).come()
        assert "two processes are rank 1" in stranger.hears(Refused).reason
        stranger.hears_no_more()
        ranks[1].beat(iteration=4)
        hub.until(lambda: hub.service.progress() == (1, 4))


def test_a_rank_of_another_attempt_is_told_and_turned_away():
    with serving() as hub:
        stranger = Caller(hub, 0, attempt=3).come()
        assert "this is attempt 0" in stranger.hears(Refused).reason
        stranger.hears_no_more()
        with world(hub):
            hub.event(AllArrived)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 300_000, b'{"v":1}\n', b"[" * 100_000 + b"\n"]
)
def test_garbage_is_closed_on_and_disturbs_nobody(garbage):
    with serving() as hub, world(hub) as ranks:
        with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
            stranger.setblocking(False)
            sent = 0
            while sent < len(garbage):
                try:
                    sent += stranger.send(garbage[sent:])
                except BlockingIOError:
                    hub.turn()
                except ConnectionError:
                    break
            connection = Connection(stranger)
            hub.until(lambda: list(connection.receive()) or connection.ended)
        ranks[0].beat(iteration=9)
        hub.until(lambda: hub.service.progress() == (1, 9))


def test_another_version_is_named():
    with serving() as hub:
        caller = Caller(hub)
        caller.connection.send(b'{"v":99,"type":"RankHello"}\n')
        assert "version 99" in caller.hears(Refused).reason


def test_an_exception_is_the_cause_and_the_others_leave_on_order():
    with serving() as hub, world(hub) as ranks:
        ranks[0].fail("ConnectionError", "closed by peer", derived=True)
        hub.pass_time(0.1)
        ranks[1].fail()
        assert the_cause(hub) == (1, OutcomeKind.ERROR)
        hub.service.order_leave("rank 1 failed", 84, printer=0, report="the report")
        order = ranks[0].hears(Leave)
        assert (order.code, order.report) == (84, "the report")
        assert ranks[1].hears(Leave).code is None


def test_two_failures_are_both_listed_in_the_order_in_which_they_came():
    with serving(3) as hub, world(hub, 3) as ranks:
        ranks[2].fail("KeyError", "two")
        hub.pass_time(0.05)
        ranks[1].fail("ValueError", "one")
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.others[0].rank, diagnosis.others[0].what) == (2, 1, "ValueError: one")


def test_a_death_by_signal_outranks_an_exception_that_came_a_little_before():
    with serving() as hub, world(hub) as ranks:
        ranks[0].fail("RuntimeError", "my step failed")
        hub.pass_time(0.1)
        ranks[1].close()
        hub.service.worker_ended(WorkerExit(1, -9))
        assert the_cause(hub) == (1, OutcomeKind.SIGNAL)
        assert hub.verdict().exit_code == 137


def test_a_derived_error_waits_for_the_end_that_it_is_about():
    with serving() as hub, world(hub) as ranks:
        ranks[0].fail("RuntimeError", "Connection closed by peer", derived=True)
        hub.pass_time(1.0)
        assert not hub.events[1:]
        ranks[1].close()
        hub.service.worker_ended(WorkerExit(1, -11))
        assert the_cause(hub) == (1, OutcomeKind.SIGNAL)


def test_a_closed_connection_waits_for_the_supervisors_word():
    with serving() as hub, world(hub) as ranks:
        ranks[1].close()
        hub.pass_time(0.8)
        assert hub.events[-1] == ConnectionLost(1)
        hub.service.worker_ended(WorkerExit(1, 3, stderr="lost my way"))
        diagnosis = hub.verdict()
        assert (diagnosis.cause.kind, diagnosis.exit_code, diagnosis.cause.output) == (
            OutcomeKind.EXIT,
            3,
            "lost my way",
        )


def test_without_a_supervisor_a_closed_connection_is_the_end():
    with serving(supervised=False) as hub, world(hub) as ranks:
        ranks[1].close()
        ranks[0].fail("RuntimeError", "Connection closed by peer", derived=True)
        assert the_cause(hub) == (1, OutcomeKind.LOST)


def test_a_launcher_that_ends_the_others_does_not_hide_the_exception():
    with serving(supervised=False) as hub, world(hub) as ranks:
        ranks[1].fail()
        hub.pass_time(0.05)
        ranks[1].close()
        ranks[0].close()
        assert the_cause(hub) == (1, OutcomeKind.ERROR)


def test_ending_with_0_while_the_world_is_open_is_leaving_early():
    with serving() as hub, world(hub) as ranks:
        ranks[1].close()
        hub.service.worker_ended(WorkerExit(1, 0))
        assert the_cause(hub) == (1, OutcomeKind.EARLY)
        assert hub.verdict().exit_code == 1


def test_ranks_that_all_end_with_0_have_not_failed():
    with serving() as hub, world(hub) as ranks:
        for caller in ranks:
            caller.close()
            hub.service.worker_ended(WorkerExit(caller.rank, 0))
        hub.event(AllEnded)
        assert not [event for event in hub.events if isinstance(event, Verdict)]


def test_a_rank_that_closed_its_world_early_is_the_cause():
    with serving() as hub, world(hub) as ranks:
        ranks[1].beat(iteration=3)
        ranks[1].say(Goodbye(1))
        ranks[1].close()
        hub.pass_time(0.5)
        assert not hub.events[1:]
        ranks[0].fail("RuntimeError", "Connection closed by peer", derived=True)
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.EARLY)
        assert "epoch 1, iteration 3" in diagnosis.cause.what


def test_ranks_may_leave_in_order_at_different_times():
    with serving() as hub, world(hub) as ranks:
        for caller in ranks:
            caller.say(Goodbye(caller.rank))
            caller.close()
            hub.pass_time(0.5)
            hub.service.worker_ended(WorkerExit(caller.rank, 0))
        hub.event(AllEnded)
        assert [type(event) for event in hub.events] == [AllArrived, AllEnded]


def test_a_world_may_be_opened_again_by_the_same_processes():
    with serving() as hub, world(hub) as ranks:
        ranks[0].say(Goodbye(0))
        again = Caller(hub, 0).come()
        hub.pass_time(0.1)
        ranks[1].say(Goodbye(1))
        Caller(hub, 1).come().hears(Welcome)
        again.hears(Welcome)
        assert len([event for event in hub.events if isinstance(event, AllArrived)]) == 2


def test_scripts_that_never_connect_are_judged_by_their_ends():
    lost = "Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n"
    with serving() as hub:
        hub.service.worker_ended(WorkerExit(0, 1, stderr=lost))
        hub.service.worker_ended(WorkerExit(1, 1, stderr="ValueError: bad\n"))
        assert the_cause(hub) == (1, OutcomeKind.EXIT)


def test_a_rank_that_ends_before_the_others_could_meet_it_is_named_at_once():
    with serving() as hub:
        waits = Caller(hub, 0).come()
        hub.pass_time(0.1)
        hub.service.worker_ended(WorkerExit(1, 0))
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.EARLY)
        assert "did not call init" in diagnosis.cause.what
        assert not waits.listen()


def test_a_rank_that_made_room_has_not_failed():
    with serving() as hub, world(hub) as ranks:
        for caller in ranks:
            caller.say(Goodbye(caller.rank))
            hub.service.worker_ended(WorkerExit(caller.rank, 85))
        hub.event(AllEnded)
        assert not [event for event in hub.events if isinstance(event, Verdict)]


def beat_all(hub: Driven, ranks: list[Caller], seconds: float, **values: object) -> None:
    def turn() -> bool:
        for caller in ranks:
            caller.beat(**values)
            if any(isinstance(each, AskStacks) for each in caller.listen()):
                caller.heard.clear()
                caller.say(Stacks(caller.rank, "Thread 0x1 (most recent call first):\n"))
        hub.pass_time(0.3)
        return any(isinstance(event, Verdict) for event in hub.events)

    hub.until(turn, seconds)


def test_a_silent_rank_is_found_and_named():
    with serving(limits="silence=1.5") as hub, world(hub) as ranks:
        ranks[1].beat()
        beat_all(hub, ranks[:1], 20)
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind, diagnosis.exit_code) == (1, OutcomeKind.HANG, 83)
        assert "frozen" in diagnosis.cause.what


def test_a_silent_ranks_stacks_come_from_its_file():
    descriptor, address = make_stacks_file()
    os.write(descriptor, b'Thread 0x1 (most recent call first):\n  File "train.py", line 3 in spin\n')
    with serving(limits="silence=1.5") as hub, world(hub, stacks_file=address) as ranks, os.fdopen(descriptor):
        ranks[1].beat()
        beat_all(hub, ranks[:1], 20)
        assert "in spin" in hub.verdict().cause.stacks


def test_the_rank_that_stays_too_long_is_named_and_not_those_that_wait():
    with serving(limits="step=1") as hub, world(hub) as ranks:
        hangs = {"seconds": 5.0, "iteration": 7}

        def turn() -> bool:
            ranks[0].beat(**hangs, waiting="gradients")
            ranks[1].beat(**hangs)
            hub.pass_time(0.3)
            return any(isinstance(event, Verdict) for event in hub.events)

        hub.until(turn)
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.HANG)
        assert diagnosis.others[0].kind is OutcomeKind.RUNNING
        assert diagnosis.others[0].waiting == "gradients"


def test_who_gave_up_on_a_rank_that_hangs_is_not_the_cause():
    with serving(limits="step=100") as hub, world(hub) as ranks:
        ranks[0].fail("RuntimeError", "Timed out waiting 5000ms for recv operation to complete", derived=True)

        def turn() -> bool:
            ranks[1].beat()
            hub.pass_time(0.3)
            return any(isinstance(event, Verdict) for event in hub.events)

        hub.until(turn)
        assert the_cause(hub) == (1, OutcomeKind.HANG)


def test_ranks_that_gave_up_may_have_ended_when_the_hanging_one_is_sought():
    with serving(limits="step=100") as hub, world(hub) as ranks:
        ranks[0].fail("RuntimeError", "Timed out waiting 5000ms for recv operation to complete", derived=True)
        ranks[0].close()
        hub.service.worker_ended(WorkerExit(0, 1))

        def turn() -> bool:
            ranks[1].beat(iteration=7)
            hub.pass_time(0.3)
            return any(isinstance(event, Verdict) for event in hub.events)

        hub.until(turn)
        assert the_cause(hub) == (1, OutcomeKind.HANG)
        assert "iteration 7" in hub.verdict().cause.what


def test_a_rank_that_freezes_before_its_first_heartbeat_is_found():
    with serving(limits="silence=1.5") as hub, world(hub) as ranks:
        beat_all(hub, ranks[:1], 20)
        assert the_cause(hub) == (1, OutcomeKind.HANG)


def test_a_rank_that_moves_again_while_stacks_are_gathered_has_not_hung():
    with serving(limits="step=1") as hub, world(hub) as ranks:
        for caller in ranks:
            caller.beat(seconds=5.0)
        ranks[0].hears(AskStacks)
        for _ in range(12):
            for caller in ranks:
                caller.beat(seconds=0.0)
            hub.pass_time(0.25)
        assert not hub.events[1:]


def test_a_straggler_is_named_once_and_not_ended():
    with serving() as hub, world(hub) as ranks:
        for _ in range(8):
            ranks[0].beat(own_step=0.01)
            ranks[1].beat(own_step=0.03)
            hub.pass_time(0.3)
        assert list(hub.events[1:]) == [StragglerSeen(1, pytest.approx(3.0))]


def test_a_client_that_does_not_read_never_holds_up_the_hub(monkeypatch):
    monkeypatch.setattr("allstep.protocol.connection.LARGEST_BACKLOG", 1 << 20)
    with serving() as hub, world(hub) as ranks:
        for _ in range(20):
            hub.service.order_leave("why", 84, printer=1, report="x" * 1_000_000)
        hub.turn()
        assert [type(each) for each in ranks[0].listen()][-1] is Leave
        assert hub.service.connected == 1


def test_the_last_word_of_a_rank_that_closes_at_once_is_heard():
    with serving(supervised=False) as hub, world(hub) as ranks:
        ranks[1].fail()
        ranks[1].close()
        assert the_cause(hub) == (1, OutcomeKind.ERROR)


def test_a_shifted_wall_clock_changes_nothing(monkeypatch):
    backwards = itertools.count(1_000_000, -1000)
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    with serving() as hub, world(hub) as ranks:
        ranks[1].fail("KeyError", "first")
        hub.pass_time(0.05)
        ranks[0].fail("ValueError", "second")
        assert the_cause(hub)[0] == 1


def test_the_case_tells_later_what_became_of_the_others():
    with serving() as hub, world(hub) as ranks:
        ranks[1].fail()
        hub.verdict()
        hub.service.order_leave("rank 1 failed", 84)
        ranks[0].hears(Leave)
        hub.service.worker_ended(WorkerExit(0, 84))
        hub.service.worker_ended(WorkerExit(1, 3))
        diagnosis = hub.service.diagnosis()
        assert (diagnosis.cause.rank, diagnosis.exit_code) == (1, 3)
        assert diagnosis.others[0].kind is OutcomeKind.ORDERED


def test_a_rank_cannot_speak_for_another():
    with serving() as hub, world(hub) as ranks:
        ranks[0].rank = 1
        ranks[0].fail()
        hub.pass_time(0.6)
        assert not hub.events[1:]
