"""The sidecar as a process, and ranks as processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allstep.errors import ConfigurationError
from allstep.monitor import sidecar_process
from allstep.monitor.hub import Hub
from allstep.monitor.sidecar import Sidecar, SidecarSetup, start_sidecar
from allstep.protocol.address import new_nonce
from allstep.protocol.connection import is_ready
from allstep.protocol.messages import Welcome
from tests.monitor.driving import BOUND, Caller, RankProcess, gone, listening, rank_processes, registration, wait_for

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def sidecar(world_size: int, nonce: str, **settings: Any) -> Iterator[Sidecar]:
    started = start_sidecar(SidecarSetup(nonce, 0, world_size, **settings))
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
    nonce = new_nonce()
    with sidecar(2, nonce) as service, rank_processes(service.address, ("close",), ("close",), nonce=nonce) as ranks:
        close(ranks)
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [0, 0]
        assert not gone(service.pid)


def test_an_exception_ends_all_with_one_report_and_a_file(tmp_path, capfd):
    nonce = new_nonce()
    with (
        sidecar(3, nonce, attempt_folder=str(tmp_path), run="digits") as service,
        rank_processes(service.address, ("wait",), ("raise",), ("wait",), nonce=nonce) as ranks,
    ):
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [84, 1, 84]
        assert not any("failed first" in rank.errors() for rank in ranks)
    assert capfd.readouterr().err.count("run digits failed: rank 1 of 3 failed first") == 1
    content = json.loads((tmp_path / "failure.json").read_text())
    assert (content["cause"]["rank"], content["cause"]["kind"], content["exit_code"]) == (1, "error", 1)


def test_a_killed_rank_is_named_though_its_launcher_ends_the_others_at_once(capfd):
    nonce = new_nonce()
    with (
        sidecar(2, nonce) as service,
        rank_processes(service.address, ("kill",), ("wait",), nonce=nonce) as ranks,
    ):
        wait_for(ranks[0].ended)
        ranks[1].process.terminate()
        wait_for(lambda: ended(ranks))
    assert "rank 0 of 2 failed first" in capfd.readouterr().err


def test_without_a_standard_error_the_lowest_living_rank_writes_the_report(monkeypatch):
    def closed(fd: int) -> int:
        raise OSError(errno.EBADF, "no such descriptor")

    monkeypatch.setattr(os, "dup", closed)
    nonce = new_nonce()
    with (
        sidecar(3, nonce) as service,
        rank_processes(service.address, ("kill",), ("wait",), ("wait",), nonce=nonce) as ranks,
    ):
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [-9, 84, 84]
        assert "rank 0 of 3 failed first" in ranks[1].errors()


def test_a_frozen_rank_is_killed(capfd):
    nonce = new_nonce()
    with (
        sidecar(2, nonce, limits="silence=2") as service,
        rank_processes(service.address, ("stop",), ("wait",), nonce=nonce) as ranks,
    ):
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [-9, 83]
    assert "rank 0 of 2 made no progress" in capfd.readouterr().err


def test_a_rank_that_cleans_up_for_ever_is_killed():
    nonce = new_nonce()
    with (
        sidecar(2, nonce) as service,
        rank_processes(service.address, ("raise_slowly",), ("wait",), nonce=nonce) as ranks,
    ):
        wait_for(lambda: ended(ranks))
        assert [rank.process.returncode for rank in ranks] == [-9, 84]


def test_the_signals_of_a_scheduler_do_not_silence_it():
    nonce = new_nonce()
    with sidecar(2, nonce) as service:
        os.kill(service.pid, signal.SIGTERM)
        with rank_processes(service.address, ("wait",), ("raise",), nonce=nonce) as ranks:
            wait_for(lambda: ended(ranks))
            assert [rank.process.returncode for rank in ranks] == [84, 1]


def test_it_ends_with_the_process_that_started_it():
    with sidecar(2, new_nonce()) as service:
        service.release()
        wait_for(lambda: gone(service.pid))


def test_it_is_in_a_session_of_its_own_and_holds_nothing_of_its_starter():
    nonce = new_nonce()
    with sidecar(2, nonce) as service:
        assert os.getsid(service.pid) == service.pid
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{service.pid}/fd/{fd}") == os.devnull
        assert nonce not in Path(f"/proc/{service.pid}/cmdline").read_text()


def test_two_nodes_leave_together(capfd):
    nonce = new_nonce()
    with (
        sidecar(2, nonce) as head,
        sidecar(2, nonce, upstream=head.address, node_rank=1, ranks=[1]) as node,
        contextlib.ExitStack() as stack,
    ):
        ranks = [
            RankProcess(head.address, 0, 2, "wait", nonce=nonce),
            RankProcess(node.address, 1, 2, "raise", nonce=nonce),
        ]
        for rank in ranks:
            stack.callback(rank.end)
        wait_for(lambda: ended(ranks), BOUND)
        assert [rank.process.returncode for rank in ranks] == [84, 1]
    assert capfd.readouterr().err.count("rank 1 of 2 failed first") == 1


def test_only_ranks_of_its_node_are_killed_though_another_has_its_host_name():
    nonce, host = new_nonce(), socket.gethostname()
    with contextlib.ExitStack() as stack:
        first, here, elsewhere = (stack.enter_context(waiting_process()) for _ in range(3))
        with sidecar(3, nonce) as head:
            at = SimpleNamespace(port=int(head.address.rpartition(":")[2]))
            places = [(0, first.pid), (0, here.pid), (1, elsewhere.pid)]
            callers = []
            for rank, (node, pid) in enumerate(places):
                arrived = registration(rank, 3, host=host, node_rank=node, pid=pid)
                callers.append(Caller(at, registration=arrived, nonce=nonce).come())
            wait_for(lambda: all(Welcome() in caller.listen() for caller in callers))
            callers[0].fail()
            wait_for(lambda: here.poll() is not None)
            for caller in callers:
                caller.close()
        assert here.returncode == -signal.SIGKILL
        assert elsewhere.poll() is None


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
    with many_open_files(), sidecar(2, new_nonce()) as service:
        assert int(service.address.rpartition(":")[2]) > 0


def test_the_end_of_a_process_is_seen_whatever_its_descriptors_number():
    with many_open_files(), waiting_process() as process:
        pidfd = os.pidfd_open(process.pid)
        assert pidfd >= 1024
        assert not is_ready(pidfd)
        process.kill()
        wait_for(lambda: is_ready(pidfd))
        os.close(pidfd)


@contextlib.contextmanager
def many_open_files() -> Iterator[None]:
    """Descriptors below 1,024, where `select` ends, are all in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while held[-1] < 1024:
            held.append(os.dup(held[0]))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_limits_that_cannot_be_read_start_nothing():
    with pytest.raises(ConfigurationError, match="limits"):
        start_sidecar(SidecarSetup("n", 0, 2, limits="stepp=3"))
