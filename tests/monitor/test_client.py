"""A real client in a process of its own, against a hub that the test drives."""

from __future__ import annotations

import errno
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.errors import WorldError
from allstep.monitor.client import Client
from allstep.monitor.own_stacks import StacksTimer
from allstep.monitor.service import AllArrived, Verdict
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.messages import AskStacks, Failure, Notice, RankHello, Stacks, Welcome, encode
from allstep.protocol.server import FIRST_LINE
from tests.monitor.driving import KEY, listening, rank_processes, registration, serving
from tests.protocol.proving import answer

pytestmark = pytest.mark.slow


def test_ranks_meet_beat_and_say_goodbye():
    with serving(clock=time.monotonic) as hub, rank_processes(hub.address, ("close",), ("close",)) as ranks:
        hub.event(AllArrived)
        beats = [hub.until(lambda rank=rank: hub.service.status(rank)) for rank in (0, 1)]
        assert all(beat.epoch == 0 or (beat.epoch, beat.iteration) == (1, 7) for beat in beats)  # it may be too early
        for rank in ranks:
            rank.process.stdin.write("\n")
            rank.process.stdin.flush()
        hub.until(lambda: all(rank.ended() for rank in ranks))
        hub.pass_time(0.5)
        assert [rank.process.returncode for rank in ranks] == [0, 0]
        assert not [event for event in hub.events if isinstance(event, Verdict)]


def test_a_failure_is_reported_before_the_rank_cleans_up():
    with serving(clock=time.monotonic) as hub, rank_processes(hub.address, ("wait",), ("raise_slowly",)) as ranks:
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind, diagnosis.cause.iteration) == (1, OutcomeKind.ERROR, 7)
        assert "in fail_in_step" in diagnosis.cause.traceback
        hub.service.order_leave("rank 1 failed", 84, printer=0, report="THE REPORT\n")
        hub.until(ranks[0].ended)
        assert ranks[0].process.returncode == 84
        assert "THE REPORT" in ranks[0].errors()
        assert not ranks[1].ended()


def test_a_failing_rank_lingers_to_print_the_report():
    with (
        serving(supervised=False, clock=time.monotonic) as hub,
        rank_processes(hub.address, ("wait",), ("raise",)) as ranks,
    ):
        hub.verdict()
        assert not ranks[1].ended()
        hub.service.order_leave("rank 1 failed", 84, printer=1, report="THE REPORT\n")
        hub.until(lambda: all(rank.ended() for rank in ranks))
        assert ranks[1].process.returncode == 1
        errors = ranks[1].errors()
        assert errors.index("THE REPORT") < errors.index("ValueError: bad batch")


@pytest.mark.nightly
def test_a_frozen_rank_is_found():
    with serving(limits="silence=2", clock=time.monotonic) as hub, rank_processes(hub.address, ("wait",), ("stop",)):
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.HANG)
        assert "in main" in diagnosis.others[0].stacks


@pytest.mark.nightly
def test_a_rank_that_holds_the_interpreter_lock_leaves_stacks_and_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with (
        serving(limits="silence=4", clock=time.monotonic) as hub,
        rank_processes(hub.address, ("wait",), ("hold_gil",)) as ranks,
    ):
        hub.until(lambda: (beat := hub.service.status(1)) is not None and beat.section == "step")
        ranks[1].process.stdin.write("\n")
        ranks[1].process.stdin.flush()
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.HANG)
        assert "in main" in diagnosis.cause.stacks
    assert not list(tmp_path.iterdir())  # though both were killed


def test_a_rank_that_sleeps_is_named_with_its_stack_and_not_the_one_that_waits():
    with serving(limits="step=1.5", clock=time.monotonic) as hub, rank_processes(hub.address, ("wait",), ("sleep",)):
        diagnosis = hub.verdict()
        assert (diagnosis.cause.rank, diagnosis.cause.kind) == (1, OutcomeKind.HANG)
        assert "rank_process.py" in diagnosis.cause.stacks
        assert diagnosis.others[0].waiting == "gradients"


def test_a_forked_child_does_not_keep_a_dead_ranks_connection_open():
    with (
        serving(supervised=False, clock=time.monotonic) as hub,
        rank_processes(hub.address, ("wait",), ("fork",)) as ranks,
    ):
        hub.event(AllArrived)
        ranks[1].process.stdin.write("\n")
        ranks[1].process.stdin.flush()
        assert hub.verdict().cause.kind is OutcomeKind.LOST


def test_a_stranger_gets_the_reason_as_an_error():
    with serving(clock=time.monotonic) as hub, rank_processes(hub.address, ("close",), key="another") as ranks:
        hub.until(ranks[0].ended)
        assert "does not have this run's key" in ranks[0].errors()


def test_a_rank_outlives_its_service():
    with serving(clock=time.monotonic) as hub, rank_processes(hub.address, ("close",), ("close",)) as ranks:
        hub.event(AllArrived)
        hub.service.close()
        for rank in ranks:
            rank.process.stdin.write("\n")
            rank.process.stdin.flush()
            assert rank.process.wait(30) == 0


def test_nothing_at_the_address_is_an_error_in_bounded_time():
    sock = listening()
    port = sock.getsockname()[1]
    sock.close()
    with pytest.raises(WorldError, match=f"nothing of this run answers at 127.0.0.1:{port}"):
        Client.connect(f"127.0.0.1:{port}", KEY, RankHello(0, registration(0)), timeout=0.5)


def test_facts_that_are_too_long_are_named_with_their_size_and_the_remedy():
    facts = {"lr": "0.1", "config": "x" * FIRST_LINE}
    with (
        serving(1, clock=time.monotonic) as hub,
        pytest.raises(WorldError, match=r"rank 0: facts .* 'config', with 262144 .*digest"),
    ):
        Client.connect(hub.address, KEY, RankHello(0, registration(0, 1, facts=facts)), timeout=5)


def test_facts_of_the_greatest_length_are_taken():
    hello = RankHello(0, registration(0, 1, facts={"config": ""}), patience=30.0, stacks_file="")
    with serving(1, clock=time.monotonic) as hub:
        timer = StacksTimer()
        room = FIRST_LINE + 1 - len(encode(replace(hello, stacks_file=timer.address)))
        timer.close()
        hello = replace(hello, registration=replace(hello.registration, facts={"config": "x" * room}))
        connected: list[Client] = []
        thread = threading.Thread(target=lambda: connected.append(Client.connect(hub.address, KEY, hello, timeout=30)))
        thread.start()
        hub.until(lambda: connected)
        connected[0].close()


def test_a_frozen_service_is_an_error_in_bounded_time(monkeypatch):
    monkeypatch.setattr("allstep.monitor.client._GRACE_S", 0.5)
    with listening() as sock:
        began = time.monotonic()
        with pytest.raises(WorldError, match="may be frozen"):
            Client.connect(f"127.0.0.1:{sock.getsockname()[1]}", KEY, RankHello(0, registration(0)), timeout=0.5)
        assert time.monotonic() - began < 10


def test_a_report_to_a_frozen_service_returns_in_bounded_time():
    with listening() as sock:

        def welcome() -> None:
            accepted.append(sock.accept()[0])
            answer(accepted[0])
            accepted[0].sendall(encode(Welcome()))

        accepted: list[socket.socket] = []
        thread = threading.Thread(target=welcome)
        thread.start()
        client = Client.connect(f"127.0.0.1:{sock.getsockname()[1]}", KEY, RankHello(0, registration(0)), timeout=30)
        thread.join()
        began = time.monotonic()
        for _ in range(3):
            client.report(Failure(0, 0, 0, "ValueError", "x" * 1_000_000, ""))
        client.close()
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("behind", [b"", encode(Notice("slow down\n"))])
def test_what_comes_right_behind_the_welcome_is_heard(behind, capfd):
    with listening() as sock:

        def welcome() -> None:
            accepted.append(sock.accept()[0])
            answer(accepted[0])
            accepted[0].sendall(encode(Welcome()) + behind)

        accepted: list[Any] = []
        thread = threading.Thread(target=welcome)
        thread.start()
        client = Client.connect(f"127.0.0.1:{sock.getsockname()[1]}", KEY, RankHello(0, registration(0)), timeout=30)
        client.start(RankActivity())
        thread.join()
        assert b'"Heartbeat"' in receive_until(accepted[0], b"Heartbeat")
        client.close()
        accepted[0].close()
    assert ("slow down" in capfd.readouterr().err) == bool(behind)


def test_a_rank_that_cannot_write_its_stacks_says_so_and_goes_on(monkeypatch):
    def full() -> str:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("allstep.monitor.client.own_stacks", full)
    with listening() as sock:
        accepted: list[socket.socket] = []

        def welcome() -> None:
            accepted.append(sock.accept()[0])
            answer(accepted[0])
            accepted[0].sendall(encode(Welcome()) + encode(AskStacks()))

        thread = threading.Thread(target=welcome)
        thread.start()
        hello = RankHello(0, registration(0, 1))
        client = Client.connect(f"127.0.0.1:{sock.getsockname()[1]}", KEY, hello, timeout=30)
        client.start(RankActivity())
        thread.join()
        with accepted[0] as service:
            assert encode(Stacks(0, "")) in receive_until(service, encode(Stacks(0, "")))
            receive_until(service, b'"number":')
            client.close()


def receive_until(sock: socket.socket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        data += sock.recv(4096)
    return data
