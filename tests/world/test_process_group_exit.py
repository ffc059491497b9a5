"""How whole processes end: what is about the interpreter's exit cannot be seen from inside a rank."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from allstep.launch.environment import ReservedPort, worker_environment
from tests.jobs.forked import Script, run_forked
from tests.jobs.job import Job
from tests.jobs.processes import freeze
from tests.jobs.running import start
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

CLOSES_ON_A_FILE = """
import os, time
import allstep
with allstep.init(timeout=600):
    print("met", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.05)  # the file is the only sign
"""


def places(port: int) -> list[dict[str, str]]:
    """The variables of two ranks that meet at this port."""
    return [
        worker_environment(
            rank=rank,
            world_size=2,
            local_rank=rank,
            local_world_size=2,
            master_addr="127.0.0.1",
            master_port=port,
            run_id="leaving",
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Job]]:
    """What came of both ranks of the scripts that end by themselves."""
    folder = tmp_path_factory.mktemp("ended")
    texts = {"raises": RAISES_WITH_A_PENDING_COLLECTIVE, "never closes": NEVER_CLOSES}
    with ReservedPort(shared=True) as one, ReservedPort(shared=True) as other:
        scripts = []
        for (name, text), reserved in zip(texts.items(), (one, other), strict=True):
            path = folder / f"{name}.py"
            path.write_text(text)
            scripts += [Script(path, [str(folder)], variables) for variables in places(reserved.port)]
        jobs = run_forked(folder, *scripts)
    return {"raises": jobs[:2], "never closes": jobs[2:]}


def test_a_process_that_raises_during_a_collective_ends_with_its_traceback(ended: dict[str, list[Job]]) -> None:
    _, raising = ended["raises"]
    assert raising.code == 1
    assert "RuntimeError: boom" in raising.err


def test_a_world_that_nobody_closes_serves_the_others_a_moment_longer(ended: dict[str, list[Job]]) -> None:
    main, other = ended["never closes"]
    # gloo of torch 2.9 prints its connections to standard output first
    assert (other.code, other.out.splitlines()[-1:]) == (0, ["my turn"]), other.err
    assert main.code == 0


@pytest.mark.nightly
def test_worlds_close_in_bounded_time_when_the_launchers_agent_is_frozen(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(CLOSES_ON_A_FILE)
    with served_store() as (agent, port), contextlib.ExitStack() as stack:
        agents = {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
        ranks = [
            stack.enter_context(start(tmp_path, [sys.executable, path], env=variables | agents))
            for variables in places(port)
        ]
        for rank in ranks:
            rank.await_line("met")
        freeze(agent.pid)
        (tmp_path / "go").touch()
        jobs = [rank.end() for rank in ranks]
    for job in jobs:
        assert job.code == 0, job.text
        assert "may be frozen" in job.err
