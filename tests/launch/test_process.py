"""A worker's process as the supervisor holds it, with pidfd and without."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from allstep.launch.forking import ForkedChild
from allstep.launch.process import Pipes, WorkerProcess, start_worker, watched
from allstep.launch.worker_plan import Command, WorkerPlan
from allstep.protocol.connection import is_ready
from tests.jobs.launchers import script
from tests.jobs.processes import LIMIT, alive


def plan(target: Path) -> WorkerPlan:
    return WorkerPlan(run_id="r", rank=0, world_size=2, environment=dict(os.environ), command=Command(str(target)))


def start(target: Path, pidfd: bool) -> tuple[WorkerProcess, Pipes]:
    pipes = Pipes.open()
    worker = start_worker(plan(target), pipes, pidfd=pidfd)
    pipes.hand_over()
    return worker, pipes


@pytest.mark.parametrize("pidfd", [True, False])
@pytest.mark.parametrize(("text", "returncode"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9), ("", 0)])
def test_the_end_of_a_worker_makes_its_descriptor_readable_and_is_told(
    text: str, returncode: int, pidfd: bool, tmp_path: Path
) -> None:
    worker, pipes = start(script(tmp_path, text), pidfd)
    try:
        assert is_ready(worker.exit_fd, LIMIT)
        assert worker.returncode() == returncode
        worker.send(signal.SIGTERM)  # to one that has ended: nothing
    finally:
        worker.release(LIMIT)
        pipes.close()


def test_a_worker_that_leads_no_group_yet_is_killed_all_the_same() -> None:
    waits, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(release)
        os.read(waits, 1)  # where a worker that was forked from a template waits, before it leads a group
        os._exit(0)
    worker = watched(ForkedChild(pid))
    worker.kill_group()
    assert is_ready(worker.exit_fd, LIMIT)
    assert worker.returncode() == -signal.SIGKILL
    worker.release(LIMIT)
    os.close(waits)
    os.close(release)


@pytest.mark.parametrize("pidfd", [True, False])
def test_release_kills_a_worker_and_what_it_started(pidfd: bool, tmp_path: Path) -> None:
    text = "import signal\nchild = os.fork()\nif child:\n    print(child, flush=True)\nsignal.pause()"
    worker, pipes = start(script(tmp_path, text), pidfd)
    try:
        child = int(os.read(pipes.stdout[0], 100))
        assert not is_ready(worker.exit_fd)
        assert alive(child)
        copy = os.pidfd_open(child)
    finally:
        worker.release(LIMIT)
        pipes.close()
    assert is_ready(copy, LIMIT)
    os.close(copy)


def test_a_process_that_does_not_end_is_not_waited_for() -> None:
    worker = start_stuck()
    worker.release(0.0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(worker.exit_fd)


def start_stuck() -> WorkerProcess:
    """Descriptors as a worker's, and a process whose end nobody may wait for."""

    class Stuck:
        pid = 2**22 + 1  # no process can have it

        def wait(self) -> int:
            raise AssertionError("waits without bound")

    stuck: Any = Stuck()
    return WorkerProcess(stuck, os.pipe()[0])
