"""The sidecar as a process, and ranks as processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allstep.errors import ConfigurationError
from allstep.monitor import sidecar_process
from allstep.monitor.hub import Hub
from allstep.monitor.sidecar import Sidecar, SidecarSetup, start_sidecar
from allstep.protocol.address import new_key
from allstep.protocol.connection import is_ready
from allstep.protocol.messages import Welcome
from allstep.protocol.worker_exit import WorkerExit
from tests.jobs.processes import many_open_files
from tests.monitor.driving import (
    BOUND,
    KEY,
    Caller,
    RankProcess,
    gone,
    listening,
    rank_processes,
    registration,
    serving,
    wait_for,
)

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def sidecar(world_size: int, key: str, **settings: Any) -> Iterator[Sidecar]:
    started = start_sidecar(SidecarSetup(key, 0, world_size, **settings))
    try:
        yield started
    finally:
        started.release()
        try:
            wait_for(lambda: gone(started.pid), 20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(started.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(started.pid, 0)


def close(ranks: list[RankProcess]) -> None:
    for rank in ranks:
        rank.process.stdin.write("\n")
        rank.process.stdin.flush()


def ended(ranks: list[RankProcess]) -> bool:
    return all(rank.ended() for rank in ranks)


def test_ranks_train_and_leave_and_the_sidecar_ends():
    key = new_key()
    with sidecar(2, key) as service, rank_processes(service.address, ("close",), ("close",), key=key) as ranks:
        close(ranks)
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [0, 0]
        assert not gone(service.pid)


def test_an_exception_ends_all_with_one_report_and_a_file(tmp_path, capfd):
    key = new_key()
    with (
        sidecar(3, key, attempt_folder=str(tmp_path), run="digits") as service,
        rank_processes(service.address, ("wait",), ("raise",), ("wait",), key=key) as ranks,
    ):
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [84, 1, 84]
        assert not any("failed first" in rank.errors() for rank in ranks)
    assert capfd.readouterr().err.count("run digits failed: rank 1 of 3 failed first") == 1
    content = json.loads((tmp_path / "failure.json").read_text())
    assert (content["cause"]["rank"], content["cause"]["kind"], content["exit_code"]) == (1, "error", 1)


def test_a_killed_rank_is_named_though_its_launcher_ends_the_others_at_once(capfd):
    key = new_key()
    with (
        sidecar(2, key) as service,
        rank_processes(service.address, ("kill",), ("wait",), key=key) as ranks,
    ):
        wait_for(ranks[0].ended)
        ranks[1].process.terminate()
        wait_for(lambda: ended(ranks))
    assert "rank 0 of 2 failed first" in capfd.readouterr().err


def test_without_a_standard_error_the_lowest_living_rank_writes_the_report(monkeypatch):
    def closed(fd: int) -> int:
        raise OSError(errno.EBADF, "no such descriptor")

    monkeypatch.setattr(os, "dup", closed)
    key = new_key()
    with (
        sidecar(3, key) as service,
        rank_processes(service.address, ("kill",), ("wait",), ("wait",), key=key) as ranks,
    ):
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [-9, 84, 84]
        assert "rank 0 of 3 failed first" in ranks[1].errors()


def test_a_frozen_rank_is_killed(capfd):
    key = new_key()
    with (
        sidecar(2, key, limits="silence=2") as service,
        rank_processes(service.address, ("stop",), ("wait",), key=key) as ranks,
    ):
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [-9, 83]
    said = capfd.readouterr().err
    assert "rank 0 of 2 made no progress" in said
    assert "its process is stopped, as by SIGSTOP" in said


def test_a_rank_at_a_debuggers_prompt_waits_for_a_person(capfd):
    key = new_key()
    with (
        sidecar(2, key, limits="step=1,silence=2") as service,
        rank_processes(service.address, ("prompt",), ("wait",), key=key) as ranks,
    ):
        began = time.monotonic()
        # Twice the limit and the time that stacks are gathered for.
        wait_for(lambda: time.monotonic() - began > 6.0 or any(rank.ended() for rank in ranks))
        assert not any(rank.ended() for rank in ranks)
        ranks[0].process.kill()
        wait_for(lambda: ended(ranks))
    assert "rank 0 of 2 failed first\n  killed by SIGKILL" in capfd.readouterr().err


def processor_seconds(pid: int) -> float:
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("behind_a_relay", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_rank_in_one_long_call_that_computes_is_not_frozen(behind_a_relay, capfd):
    key = new_key()
    with contextlib.ExitStack() as stack:
        service = head = stack.enter_context(sidecar(2, key, limits="silence=2", nodes=2))
        if behind_a_relay:
            given = {"upstream": head.address, "node_rank": 1, "ranks": [1], "limits": "silence=2"}
            service = stack.enter_context(sidecar(2, key, **given))
        ranks = [
            RankProcess(head.address, 0, 2, "wait", key=key),
            RankProcess(service.address, 1, 2, "burn", key=key, node=int(behind_a_relay)),
        ]
        for rank in ranks:
            stack.callback(rank.end)
        # Longer than the limit, and than stacks are gathered for.
        wait_for(lambda: processor_seconds(ranks[1].process.pid) > 5.5, 120)
        assert not any(rank.ended() for rank in ranks)
        ranks[1].process.kill()
        wait_for(lambda: ended(ranks))
    assert "rank 1 of 2 failed first\n  killed by SIGKILL" in capfd.readouterr().err


@pytest.mark.nightly
def test_a_rank_that_cleans_up_for_ever_is_killed():
    key = new_key()
    with (
        sidecar(2, key) as service,
        rank_processes(service.address, ("raise_slowly",), ("wait",), key=key) as ranks,
    ):
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [-9, 84]


def test_the_signals_of_a_scheduler_do_not_silence_it():
    key = new_key()
    with sidecar(2, key) as service:
        os.kill(service.pid, signal.SIGTERM)
        with rank_processes(service.address, ("wait",), ("raise",), key=key) as ranks:
            wait_for(lambda: ended(ranks))
            assert [rank.process.returncode for rank in ranks] == [84, 1]


def test_it_ends_with_the_process_that_started_it():
    with sidecar(2, new_key()) as service:
        service.release()
        wait_for(lambda: gone(service.pid))


def test_it_is_in_a_session_of_its_own_and_holds_nothing_of_its_starter():
    key = new_key()
    with sidecar(2, key) as service:
        assert os.getsid(service.pid) == service.pid
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{service.pid}/fd/{fd}") == os.devnull
        assert key not in Path(f"/proc/{service.pid}/cmdline").read_text()


def test_two_nodes_leave_together(capfd):
    key = new_key()
    with (
        sidecar(2, key, nodes=2) as head,
        sidecar(2, key, upstream=head.address, node_rank=1, ranks=[1]) as node,
        contextlib.ExitStack() as stack,
    ):
        ranks = [
            RankProcess(head.address, 0, 2, "wait", key=key),
            RankProcess(node.address, 1, 2, "raise", key=key),
        ]
        for rank in ranks:
            stack.callback(rank.end)
        wait_for(lambda: ended(ranks), BOUND)
        assert [rank.process.returncode for rank in ranks] == [84, 1]
    assert capfd.readouterr().err.count("rank 1 of 2 failed first") == 1


ENDS = {
    "kill": "killed by SIGKILL",
    "segfault": "killed by SIGSEGV",
    "abort": "killed by SIGABRT",
    "exit": "exit code 3",
}


@contextlib.contextmanager
def one_rank_a_node(key: str, *actions: str, limits: str = "") -> Iterator[tuple[list[RankProcess], list[Sidecar]]]:
    """Ranks that are each alone on their node. A node's service goes with its rank, which held its lifeline."""
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(sidecar(len(actions), key, nodes=len(actions), limits=limits))
        services, ranks = [head], []
        for rank in range(1, len(actions)):
            given = {"upstream": head.address, "node_rank": rank, "ranks": [rank], "limits": limits}
            services.append(stack.enter_context(sidecar(len(actions), key, **given)))
        for rank, (service, action) in enumerate(zip(services, actions, strict=True)):
            ranks.append(RankProcess(service.address, rank, len(actions), action, key=key, node=rank))
            stack.callback(ranks[-1].end)
        yield ranks, services


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_alone_on_its_node_is_named_with_how_it_ended(end, rank, capfd):
    actions = ["wait", "wait"]
    actions[rank] = end
    with one_rank_a_node(new_key(), *actions) as (ranks, services):
        # On a busy machine it is told to leave before it says so.
        assert ranks[1].process.stdout.readline() in ("welcome\n", "")
        services[1].release()
        wait_for(lambda: ended(ranks))
    said = capfd.readouterr().err
    assert f"rank {rank} of 2 failed first\n  {ENDS[end]}" in said
    assert "node" not in said.partition("failed first")[0]
    assert "wrote nothing" not in said  # nobody read what it wrote


def test_a_node_that_is_lost_with_its_rank_is_called_that(capfd):
    with one_rank_a_node(new_key(), "wait", "wait", limits="link=2") as (ranks, services):
        for rank in ranks:
            assert rank.process.stdout.readline() == "welcome\n"
        os.kill(services[1].pid, signal.SIGSTOP)  # nothing comes from there any more
        wait_for(lambda: ended(ranks[:1]))
        os.kill(services[1].pid, signal.SIGCONT)
    assert "a node of its 2 ranks was lost\n  was lost with node 1" in capfd.readouterr().err


def test_a_rank_is_named_where_the_scheduler_ended_its_nodes_service_too(capfd):
    with one_rank_a_node(new_key(), "wait", "wait") as (ranks, services):
        for rank in ranks:
            assert rank.process.stdout.readline() == "welcome\n"
        os.kill(services[1].pid, signal.SIGKILL)
        ranks[1].process.kill()
        wait_for(lambda: ended(ranks))
    said = capfd.readouterr().err
    assert "rank 1 of 2 failed first\n  is gone" in said
    assert "its node's service ended with it" in said


@pytest.mark.parametrize("foretold", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_one_relay_reports_a_rank_whose_head_died_with_it(foretold, capfd):
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(serving(3, supervised=False))
        services = [
            stack.enter_context(sidecar(3, KEY, upstream=hub.address, node_rank=node, ranks=[node])) for node in (1, 2)
        ]
        ranks = [RankProcess(each.address, node, 3, "wait", node=node) for node, each in enumerate(services, 1)]
        for rank in ranks:
            stack.callback(rank.end)
        first = Caller(hub, 0, 3).come()
        stack.callback(first.close)
        first.hears(Welcome)
        if foretold:
            hub.service.foretell(WorkerExit(0, -9))
        hub.service.close()
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [84, 84]
    said = capfd.readouterr().err
    what = "rank 0 of 3 failed first\n  killed by SIGKILL" if foretold else "the head's service at "
    assert said.count("failed: ") == said.count(what) == 1


def test_what_a_process_does_after_its_world_was_closed_is_no_failure(capfd):
    key = new_key()
    with sidecar(2, key) as service, rank_processes(service.address, ("close",), ("wait",), key=key) as ranks:
        close(ranks[:1])
        wait_for(lambda: ended(ranks[:1]))
        ranks[1].process.send_signal(signal.SIGKILL)
        wait_for(lambda: ended(ranks))
    assert "rank 1 of 2 failed first\n  killed by SIGKILL" in capfd.readouterr().err


@pytest.mark.nightly
def test_only_the_process_that_holds_a_ranks_connection_is_killed():
    """Ranks that do not leave are killed; a pid that somebody only says is its own is not."""
    key, host = new_key(), socket.gethostname()
    with contextlib.ExitStack() as stack:
        forged, elsewhere = (stack.enter_context(waiting_process()) for _ in range(2))
        with sidecar(4, key) as head:
            ranks = [RankProcess(head.address, rank, 4, what, key=key) for rank, what in enumerate(("raise", "stop"))]
            for rank in ranks:
                stack.callback(rank.end)
            at = SimpleNamespace(port=int(head.address.rpartition(":")[2]))
            places = [(0, forged.pid), (1, elsewhere.pid)]
            for rank, (node, pid) in enumerate(places, 2):
                arrived = registration(rank, 4, host=host, node_rank=node, pid=pid)
                stack.callback(Caller(at, registration=arrived, key=key).come().close)
            wait_for(lambda: ended(ranks), BOUND)
        assert [rank.process.returncode for rank in ranks] == [1, -signal.SIGKILL]
        assert (forged.poll(), elsewhere.poll()) == (None, None)


@contextlib.contextmanager
def waiting_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_its_loop_asks_who_is_connected_only_when_it_may_end(monkeypatch):
    """It goes through all ranks for that, and each heartbeat is a turn of the loop."""
    asked: list[bool] = []
    monkeypatch.setattr(Hub, "connected", property(lambda hub: asked.append(True) or 1))
    theirs, lifeline = os.pipe()
    setup = SidecarSetup("n", 0, 2)
    loop = sidecar_process.SidecarLoop(setup, theirs, listening(), None)
    with contextlib.closing(loop):
        assert not loop.is_over()
        assert not asked
        os.close(lifeline)
        loop.read_lifeline()
        assert not loop.is_over()
        assert asked
    os.close(theirs)


def test_it_starts_from_a_process_with_many_open_files():
    with many_open_files(), sidecar(2, new_key()) as service:
        assert int(service.address.rpartition(":")[2]) > 0


def test_the_end_of_a_process_is_seen_whatever_its_descriptors_number():
    with many_open_files(), waiting_process() as process:
        pidfd = os.pidfd_open(process.pid)
        assert pidfd >= 1024
        assert not is_ready(pidfd)
        process.kill()
        wait_for(lambda: is_ready(pidfd))
        os.close(pidfd)


def test_limits_that_cannot_be_read_start_nothing():
    with pytest.raises(ConfigurationError, match="limits"):
        start_sidecar(SidecarSetup("n", 0, 2, limits="stepp=3"))
