"""How whole processes end: what is about the interpreter's exit cannot be seen from inside a rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allstep.launch.environment import ReservedPort, worker_environment
from allstep.world.bounded_store import poll
from tests.jobs.processes import freeze
from tests.world.frozen_store import served_store

pytestmark = pytest.mark.slow

RAISES_WITH_A_PENDING_COLLECTIVE = """
import pathlib, sys, time
import torch, torch.distributed as dist
import allstep
with allstep.init(timeout=300) as world:
    if world.rank == 1:
        work = dist.all_reduce(torch.ones(3), async_op=True)
        raise RuntimeError("boom")
    while True:
        time.sleep(1)
"""

NEVER_CLOSES = """
import atexit, os, pathlib, sys, time
import allstep
from allstep.world.bounded_store import poll
ending, ended = pathlib.Path(sys.argv[1], "main rank is ending"), pathlib.Path(sys.argv[1], "main rank has ended")
if os.environ["RANK"] == "0":
    atexit.register(ended.touch)  # the last of its exit handlers
world = allstep.init(timeout=60)
if world.is_main:
    with world.main_first():
        pass
    atexit.register(ending.touch)
else:
    assert poll(ending.exists, time.monotonic() + 30)
    assert not poll(ended.exists, time.monotonic() + 0.3)
    with world.main_first():
        print("my turn")
"""

CLOSES_ON_A_WORD = """
import sys
import allstep
with allstep.init(timeout=600):
    print("met", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def start(tmp_path: Path):
    """Starts a script as two ranks; whatever is left of them at the end is killed."""
    processes: list[subprocess.Popen[str]] = []
    with ReservedPort(shared=True) as reserved:

        def start_two(script: str, agents_port: int | None = None) -> list[subprocess.Popen[str]]:
            agent = {} if agents_port is None else {"TORCHELASTIC_USE_AGENT_STORE": "True"}
            (tmp_path / "script.py").write_text(script)
            for rank in range(2):
                place = worker_environment(
                    rank=rank,
                    world_size=2,
                    local_rank=rank,
                    local_world_size=2,
                    master_addr="127.0.0.1",
                    master_port=agents_port or reserved.port,
                    run_id="leaving",
                )
                command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
                environment = {**os.environ, **place, **agent, "OMP_NUM_THREADS": "1"}
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
                processes.append(subprocess.Popen(command, env=environment, **pipes))
            return processes

        yield start_two
        for process in processes:
            process.kill()
            process.communicate()


def test_a_process_that_raises_during_a_collective_ends_with_its_traceback(start):
    _, raising = start(RAISES_WITH_A_PENDING_COLLECTIVE)
    _, stderr = raising.communicate(timeout=60)
    assert raising.returncode == 1
    assert "RuntimeError: boom" in stderr


def test_a_world_that_nobody_closes_serves_the_others_a_moment_longer(start):
    main, other = start(NEVER_CLOSES)
    stdout, stderr = other.communicate(timeout=60)
    # gloo of torch 2.9 prints its connections to standard output first
    assert (other.returncode, stdout.splitlines()[-1:]) == (0, ["my turn"]), stderr
    assert poll(lambda: main.poll() is not None, time.monotonic() + 30)
    assert main.returncode == 0


@pytest.mark.nightly
def test_worlds_close_in_bounded_time_when_the_launchers_agent_is_frozen(start):
    with served_store() as (agent, port):
        ranks = start(CLOSES_ON_A_WORD, agents_port=port)
        assert [rank.stdout.readline() for rank in ranks] == ["met\n"] * 2
        freeze(agent.pid)
        for rank in ranks:
            rank.stdin.write("\n")
            rank.stdin.flush()
        ends = [rank.communicate(timeout=90) for rank in ranks]
    for rank, (_, stderr) in zip(ranks, ends, strict=True):
        assert rank.returncode == 0, stderr
        assert "may be frozen" in stderr
