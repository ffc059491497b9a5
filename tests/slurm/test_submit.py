"""`allstep submit` on a real SLURM: a job that is stopped goes on, and ends as one that was never stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.slurm.cluster import Cluster, Completed

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(300)]

TRAIN = """
import os, sys, time
import torch
import allstep
from allstep import Checkpoint, Engine, Events, Preemption

with allstep.init(seed=3) as world:
    model = world.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = torch.utils.data.TensorDataset(torch.randn(96, 4), torch.randn(96, 1))

    def step(engine, batch):
        inputs, targets = batch
        torch.manual_seed(engine.state.iteration)
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(float(sys.argv[2]))

    trainer = Engine(step)
    Checkpoint("checkpoints", {"optimizer": optimizer}, every=10, keep_last=2).attach(trainer).resume()
    Preemption().attach(trainer)
    say = lambda: print("iteration", trainer.state.iteration, flush=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, say)
    trainer.run(world.loader(data, global_batch_size=8, shuffle=True), max_epochs=int(sys.argv[1]), window=1)
    if world.is_main:
        print("seed", world.seed, "work", os.getcwd(), flush=True)
        torch.save([each.detach() for each in model.parameters()], "out.pt")
"""

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}


class Submitted:
    """A job of `allstep submit` in a project's folder."""

    def __init__(self, cluster: Cluster, project: Path) -> None:
        self.cluster, self.project = cluster, project
        self.number = ""

    def submit(self, *options: str, unset: str = "", **env: str) -> Completed:
        """Submit once the cluster is free of the job before, whose nodes may still be ending.

        Args:
            options: of `allstep submit`, with the script.
            unset: a variable to take out of the environment.
            env: variables to set.
        """
        self.until(lambda: set(self.cluster.run("sinfo", "--noheader", "--format=%T").stdout.split()) == {"idle"})
        command = [sys.executable, "-m", "allstep", "submit", "--name=job", "--env", "MASTER_ADDR=127.0.0.1", *options]
        environment = ["env", f"--chdir={self.project}", *([f"--unset={unset}"] if unset else [])]
        done = self.cluster.run(*environment, *command, env=ENVIRONMENT | env)
        self.number = done.stdout.partition(" ")[2].partition(" ")[0]
        return done

    @property
    def said(self) -> str:
        """All that the job and its members have printed."""
        return "".join(log.read_text() for log in sorted(self.project.glob("runs/job/slurm-*.log")))

    def until(self, holds: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.said + self.cluster.run("squeue").stdout
            time.sleep(0.05)  # the cluster tells nobody, so it is asked again

    def until_said(self, words: str, times: int = 1) -> None:
        self.until(lambda: self.said.count(words) >= times)

    def state(self) -> str:
        return self.cluster.run("squeue", "--noheader", "--format=%T", f"--jobs={self.number}").stdout.strip()

    def start_again(self, seconds: int = 2) -> None:
        """Have a requeued job begin soon; a start within the same second would be refused as the one that was ended.

        Args:
            seconds: from now.
        """
        self.until(lambda: "PENDING" in self.state())
        self.cluster.run("scontrol", "update", f"job={self.number}", f"StartTime=now+{seconds}")

    def has_finished(self) -> bool:
        return "of the job: finished" in self.said

    def nodes(self) -> list[int]:
        """How many nodes each start has had."""
        starts = self.project / "runs" / "job" / "starts.jsonl"
        return [each["nodes"] for each in self.record() if "nodes" in each] if starts.exists() else []

    def record(self, folder: str = "job") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.project / "runs" / folder / "starts.jsonl").read_text().splitlines()]


@pytest.fixture
def submitted(cluster: Cluster, tmp_path: Path) -> Submitted:
    (tmp_path / "train.py").write_text(TRAIN)
    return Submitted(cluster, tmp_path)


def allstep(submitted: Submitted, *argv: str) -> Completed:
    command = [sys.executable, "-m", "allstep", *argv]
    return submitted.cluster.run("env", f"--chdir={submitted.project}", *command, env=ENVIRONMENT)


def status(submitted: Submitted, run: str = "job") -> dict[str, Any]:
    """What `allstep status` says of a run."""
    done = allstep(submitted, "status", "--json", run)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    return dict(found)


def unbroken(submitted: Submitted, epochs: int, nproc: int = 2) -> list[torch.Tensor]:
    """The parameters of the same script where nobody stops it."""
    folder = submitted.project / "unbroken"
    folder.mkdir()
    command = [sys.executable, "-m", "allstep", "run", "--nproc", str(nproc), "../train.py", str(epochs), "0"]
    done = submitted.cluster.run("env", f"--chdir={folder}", *command, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


def test_a_job_that_is_stopped_goes_on_and_ends_as_one_that_was_not(submitted: Submitted) -> None:
    asked = ("--nodes=2", "--nproc=1", "train.py", "3", "0.1")
    shown = submitted.submit("--dry-run", *asked).stdout
    done = submitted.submit(*asked)
    assert done.returncode == 0, done.stderr
    # What SLURM holds is what a dry run showed.
    assert (
        submitted.cluster.run("scontrol", "write", "batch_script", submitted.number, "-").stdout.strip()
        == shown.strip()
    )
    assert (
        done.stdout
        == f"job {submitted.number} submitted; its log: {submitted.project}/runs/job/slurm-{submitted.number}.log\n"
    )
    (submitted.project / "train.py").write_text("raise SystemExit('the copy runs, not this')")
    submitted.until_said("iteration 4")
    submitted.cluster.run("scancel", "--batch", "--signal=USR1", submitted.number)
    submitted.until_said("the job is put back into its queue")
    submitted.until(lambda: "PENDING" in submitted.state())
    waiting = status(submitted)
    assert (waiting["state"], waiting["job"], waiting["requeues"]) == ("queued", submitted.number, 1)
    assert waiting["checkpoint"]["step"] == waiting["iteration"] > 3
    submitted.start_again()
    submitted.until_said("of the job: finished")
    over = status(submitted)
    assert (over["state"], over["attempts"], over["iteration"]) == ("finished", 2, 36)
    first, ended, second, *_, finished = submitted.record()
    assert (first["saved"], ended["code"], finished["code"]) == (-1, 85, 0)
    assert second["saved"] == ended["saved"]
    (submitted.project / "train.py").write_text(TRAIN)
    assert all(map(torch.equal, torch.load(submitted.project / "out.pt"), unbroken(submitted, 3)))
