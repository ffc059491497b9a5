"""`launch/hosts.sh` as a job of a real Grid Engine over two hosts: it trains, stops in time, and is queued again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.gridengine.grid import SLOTS, Grid
from tests.jobs.launchers import ROOT, script
from tests.jobs.processes import await_condition

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

RUN_S = 300.0
HOSTS_SCRIPT = ROOT / "launch" / "hosts.sh"

TRAIN = """
import time
import torch
import allstep
from allstep import Checkpoint, Engine, Events, Preemption

with allstep.init(seed=0) as world:
    model = world.wrap(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(engine, batch):
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(PACE)

    trainer = Engine(step)
    Checkpoint("kept", every="5 iterations").attach(trainer).resume()
    Preemption().attach(trainer)
    began = trainer.state.iteration

    @trainer.on(Events.ITERATION_COMPLETED(every=10))
    def say(engine):
        world.print("at", engine.state.iteration, "from", began, "over", world.placement.nodes)

    trainer.run([torch.ones(2, 4)] * 200, max_epochs=1)
    world.print("trained", trainer.state.iteration, "from", began)
"""


def job(grid: Grid, folder: Path, pace: float, *options: str) -> str:
    """Submit the script over both hosts; the job's number."""
    script(folder, TRAIN.replace("PACE", str(pace)), "train.py")
    ours = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{grid.environ()['PATH']}", "OMP_NUM_THREADS": "1"}
    ours |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "XDG_CONFIG_HOME": str(folder)}
    output = ("-j", "y", "-o", str(folder / "log"))
    asked = ("-pe", "mpi", str(2 * SLOTS), "-cwd", "-V", *output, *options)
    return grid.submit(*asked, HOSTS_SCRIPT, "--nproc", "1", "train.py", env=ours, folder=folder)


def log(folder: Path) -> str:
    path = folder / "log"
    return path.read_text(errors="replace") if path.exists() else ""


def ended(grid: Grid, number: str, folder: Path) -> list[dict[str, str]]:
    try:
        await_condition(lambda: not grid.is_there(number), RUN_S)
        await_condition(lambda: bool(grid.account(number)), 60)
    except AssertionError as error:
        raise AssertionError(f"{grid.run('qstat', '-f')}\n{grid.run('qstat', '-j', number)}\n{log(folder)}") from error
    return grid.account(number)


def test_a_parallel_job_is_one_run_over_its_hosts(grid: Grid, tmp_path: Path) -> None:
    (start,) = ended(grid, job(grid, tmp_path, 0.0), tmp_path)
    assert "trained 200 from 0" in log(tmp_path), log(tmp_path)
    assert "at 10 from 0 over 2" in log(tmp_path)
    assert start["exit_status"].split()[0] == "0"
    assert not list(tmp_path.glob(".hosts-*"))


def test_a_job_that_is_deleted_with_notice_has_saved(grid: Grid, tmp_path: Path) -> None:
    number = job(grid, tmp_path, 0.1, "-notify")
    await_condition(lambda: "at 10 from 0" in log(tmp_path), RUN_S)
    grid.run("qdel", number)
    ended(grid, number, tmp_path)
    assert "preempted" in log(tmp_path) or "stopped by SIGTERM" in log(tmp_path), log(tmp_path)
    assert "had to be killed" not in log(tmp_path)
    ended(grid, job(grid, tmp_path, 0.0), tmp_path)
    assert re.search("trained 200 from [1-9]", log(tmp_path)), log(tmp_path)


def test_a_job_that_was_preempted_is_queued_again_and_goes_on(grid: Grid, tmp_path: Path) -> None:
    number = job(grid, tmp_path, 0.1, "-r", "y")
    await_condition(lambda: "at 10 from 0" in log(tmp_path), RUN_S)
    os.kill(script_of(number), signal.SIGTERM)
    starts = ended(grid, number, tmp_path)
    assert [start["exit_status"].split()[0] for start in starts] == ["99", "0"], log(tmp_path)
    assert re.search("trained 200 from [1-9]", log(tmp_path)), log(tmp_path)


def script_of(number: str) -> int:
    """The process of a job's script, of which Grid Engine keeps a copy that is named by the job's number."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().split(b"\0")
            # Not its children, which are forks with the same arguments: the script leads their group.
            pid = int(path.parent.name)
            if any(each.endswith(f"/job_scripts/{number}".encode()) for each in arguments) and os.getpgid(pid) == pid:
                return pid
    raise AssertionError(f"the script of job {number} does not run")
