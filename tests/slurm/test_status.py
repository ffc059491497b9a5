"""`allstep status`, `logs`, `cancel` and `history` on a real SLURM, and what they say when it is away."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.test_submit import ENVIRONMENT, Submitted, allstep, status, submitted

__all__ = ["submitted"]

pytestmark = [
    *(pytest.mark.slurm, pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("slurm")),
    pytest.mark.timeout(300),
]


def until_state(submitted: Submitted, state: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    def holds() -> bool:
        found.append(status(submitted))
        return bool(found[-1]["state"] == state)

    submitted.until(holds)
    return found[-1]


def test_a_job_is_followed_through_a_requeue_and_cancelled_with_a_save(submitted: Submitted) -> None:
    assert submitted.submit("--nodes=2", "--nproc=1", "--time=30", "train.py", "9", "0.2").returncode == 0
    submitted.until_said("iteration 4")
    submitted.until(lambda: status(submitted)["goal"] is not None)
    running = until_state(submitted, "running")
    assert running["nodes"] == "n[1-2]"
    assert (running["job"], running["world"], running["attempt"], running["goal"]) == (submitted.number, 2, 0, 108)
    assert 0 < running["limit"] <= 1800
    assert running["checkpoint"]["step"] >= 1
    submitted.cluster.run("scancel", "--batch", "--signal=USR1", submitted.number)
    submitted.until_said("the job is put back into its queue")
    assert until_state(submitted, "queued")["requeues"] == 1
    followed: list[str] = []
    watch = ("logs", "-f", "--rank=1", "job")
    follow = threading.Thread(target=lambda: followed.append(allstep(submitted, *watch).stdout))
    follow.start()
    submitted.start_again()
    submitted.until(lambda: status(submitted)["attempt"] == 1 and status(submitted)["state"] == "running")
    submitted.until(lambda: status(submitted)["rate"] is not None)
    done = allstep(submitted, "cancel", submitted.number)
    assert done.stdout == f"run job: job {submitted.number} is told to save and stop\n", done.stderr
    submitted.until(lambda: submitted.state() in ("", "FAILED", "COMPLETED"))
    assert "stopped and not started again: it was cancelled" in submitted.said
    ended = status(submitted)
    assert (ended["state"], ended["attempts"]) == ("stopped", 2)
    assert "it was cancelled" in ended["why"]
    assert ended["checkpoint"]["step"] == ended["iteration"] > running["checkpoint"]["step"]
    follow.join(60)
    assert "==> attempt 0 <==" in followed[0]
    assert f"iteration {ended['iteration']}" in followed[0].partition("==> attempt 1 <==")[2]
    attempts = json.loads(allstep(submitted, "history", "--json", "job").stdout)
    assert [(each["attempt"], each["outcome"], each["job"]) for each in attempts] == [
        (0, "preempted", submitted.number),
        (1, "preempted", submitted.number),
    ]


def test_a_task_for_each_rank_has_the_same_record(submitted: Submitted) -> None:
    submitted.submit("--nodes=2", "--tasks-per-node=1", "train.py", "9", "0.2")
    submitted.until_said("iteration 4")
    running = until_state(submitted, "running")
    assert (running["launcher"], running["world"], running["nodes"]) == ("slurm", 2, "n[1-2]")
    submitted.cluster.run("scancel", "--batch", "--signal=USR1", submitted.number)
    submitted.until_said("the job is put back into its queue")
    assert until_state(submitted, "queued")["attempts"] == 1
    submitted.start_again()
    submitted.until(lambda: status(submitted)["attempts"] == 2)
    assert "iteration" in allstep(submitted, "logs", "job").stdout
    assert "told to save and stop" in allstep(submitted, "cancel", "job").stdout
    submitted.until(lambda: submitted.state() in ("", "FAILED", "COMPLETED"))
    assert "stopped and not started again: it was cancelled" in submitted.said
    assert status(submitted)["state"] == "stopped"


def test_a_job_that_waits_is_taken_out_of_the_queue(submitted: Submitted) -> None:
    submitted.submit("--sbatch", "--hold", "train.py", "9", "0.2")
    assert status(submitted)["state"] == "queued"
    assert "is cancelled" in allstep(submitted, "cancel", submitted.number).stdout
    assert until_state(submitted, "cancelled")["attempts"] == 0


def test_a_job_that_slurm_kills_is_told_from_one_that_ended(submitted: Submitted) -> None:
    submitted.submit("--nodes=2", "--nproc=1", "train.py", "9", "0.2")
    submitted.until_said("iteration 4")
    submitted.cluster.run("scancel", "--signal=KILL", "--full", submitted.number)
    submitted.until(lambda: submitted.state() not in ("RUNNING", "COMPLETING"))
    # SLURM may have time to send the supervisors SIGTERM first, which then say that they were stopped.
    assert status(submitted)["state"] in ("failed", "cancelled", "killed", "stopped")


def test_an_sbatch_script_of_one_s_own_is_known_and_cancelled_too(cluster: Cluster, submitted: Submitted) -> None:
    start = f"srun --ntasks-per-node=1 --kill-on-bad-exit=1 {sys.executable} -u train.py 9 0.2"
    script = f"#!/bin/bash\n#SBATCH --nodes=2 --output=out.log\n{start}\n"
    (submitted.project / "own.sh").write_text(script)
    done = cluster.run("env", f"--chdir={submitted.project}", "sbatch", "--parsable", "own.sh", env=ENVIRONMENT)
    submitted.number = done.stdout.strip()
    submitted.until(lambda: list(submitted.project.glob("runs/train-*/run.json")) != [])
    submitted.until(lambda: (status(submitted, submitted.number)["iteration"] or 0) > 3)
    assert "srun has it" in allstep(submitted, "logs", submitted.number).stderr
    assert "told to save and stop" in allstep(submitted, "cancel", submitted.number).stdout
    submitted.until(lambda: submitted.state() not in ("RUNNING", "COMPLETING"))
    ended = status(submitted, submitted.number)
    assert ended["state"] == "preempted"
    assert ended["checkpoint"]["step"] == ended["iteration"]


def test_a_controller_that_is_away_is_an_answer(tmp_path: Path) -> None:
    with Cluster(tmp_path / "slurm", nodes=1) as cluster:
        (tmp_path / "project").mkdir()
        (tmp_path / "project" / "train.py").write_text("import time; time.sleep(60)")
        job = Submitted(cluster, tmp_path / "project")
        assert job.submit("train.py").returncode == 0
        controller = (cluster.folder / "run" / "slurmctld.pid").read_text().strip()
        job.until(lambda: status(job)["state"] == "running")
        subprocess.run(["kill", "-STOP", controller], check=True)
        try:
            began = time.monotonic()
            frozen = status(job)
            assert time.monotonic() - began < 15
            assert frozen["state"] == "running"
            assert "squeue did not answer within 5 s" in frozen["why"]
            refused = allstep(job, "cancel", "--now", "job")
            assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
        finally:
            subprocess.run(["kill", "-CONT", controller], check=True)
