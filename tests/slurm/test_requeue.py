"""A job that is told that its time is up saves, goes back into the queue, and goes on where it was."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]


def until(holds: Callable[[], bool], log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.05)  # the cluster tells nobody, so it is asked again


def test_a_job_that_gets_usr1_is_requeued_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    job = f"{sys.executable} -m tests.checkpoint.job {tmp_path}/saved {tmp_path}/out.pt 100iterations 0.3"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\ncd {ROOT}\nsrun --mpi=none --ntasks=2 {job}\n")
    options = ("--requeue", "--open-mode=append", f"--output={log}", f"--error={log}", "--ntasks=2", "--parsable")
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "JOB_REQUEUE": "1",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    }
    number = cluster.run("sbatch", *options, str(script), env=environment).stdout.strip()
    until(lambda: log.exists() and "iteration 3" in log.read_text(), log)
    cluster.run("scancel", "--signal=USR1", number)
    until(lambda: f"SLURM job {number} is put back into its queue" in log.read_text(), log)
    before = log.read_text()
    until(lambda: "PENDING" in cluster.run("squeue", "--noheader", "--format=%T", "--jobs", number).stdout, log)
    cluster.run("scontrol", "update", f"job={number}", "StartTime=now")
    until(lambda: len(re.findall(r"^done$", log.read_text(), re.M)) == 2, log)
    reached = max(int(each) for each in re.findall(r"iteration (\d+)$", before, re.M))
    after = re.findall(r"^iteration (\d+)$", log.read_text()[len(before) :], re.M)
    assert min(map(int, after)) == reached + 1
