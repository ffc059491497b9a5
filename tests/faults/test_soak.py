"""A job on the digits example, struck again and again, ends with the weights of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from allstep.checkpoint import entries
from allstep.exit_codes import PREEMPTED
from tests.jobs.running import run, started

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
LIMIT_S = 120.0


def arguments(folder, name, every):
    script = [ROOT / "examples" / "digits.py", "--epochs", "12", "--save", folder / f"{name}.pt"]
    return ["--nproc", "2", "--grace", "60", *script, "--checkpoints", folder / name, "--checkpoint-every", every]


def newest(folder):
    return max((each.manifest.step for each in entries(str(folder)) if each.manifest is not None), default=0)


def strike(kind, process):
    """Hurt the run; whether it may end by itself."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if not children:
        return
    rank = int(random.choice(children))
    if kind == "TERM":
        process.send_signal(signal.SIGTERM)
    elif kind == "KILL":
        os.kill(rank, signal.SIGKILL)
    else:
        os.kill(rank, signal.SIGSTOP)
        time.sleep(random.random())  # frozen, and then the machine is gone
        process.kill()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_blows_change_nothing(tmp_path):
    random.seed(0)
    struck, ended = 0, None
    while ended != 0:
        with started(tmp_path, *arguments(tmp_path, "struck", "5 iterations"), env=ENV) as running:
            process = running.process
            goal = newest(tmp_path / "struck") + random.randint(1, 9)
            deadline = time.monotonic() + LIMIT_S
            while struck < 20 and process.poll() is None and newest(tmp_path / "struck") < goal:
                assert time.monotonic() < deadline, "no progress"
                time.sleep(0.02)  # a commit tells nobody outside
            if struck < 20 and process.poll() is None:
                strike(random.choice(["TERM", "KILL", "FREEZE"]), process)
                struck += 1
            job = running.end(limit=LIMIT_S)
            ended = job.code
            assert ended in (0, PREEMPTED, 128 + signal.SIGKILL, -signal.SIGKILL), job.text
            assert struck == 20 or ended != 0, "it ended before it was struck often enough"
    done = run(tmp_path, *arguments(tmp_path, "unbroken", "epoch"), env=ENV)
    assert done.code == 0, done.err
    mine, expected = torch.load(tmp_path / "struck.pt"), torch.load(tmp_path / "unbroken.pt")
    assert struck == 20
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
