"""Rows 36 and 45 of the fault matrix: memory runs out, and a place for logs and reports that cannot be written."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.faults.rehearsal import BOUND, NEVER, SCRIPTS, STRIKES, check_first_lines, rehearse
from tests.jobs.launchers import Launcher, also_under_torchrun_by_night, command
from tests.jobs.running import run

pytestmark = pytest.mark.slow

MIB = 2**20
AT = FaultPlan.at(rank=1, iteration=7)
INSIDE = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def memory_cgroup(limit: int) -> Path:
    """Make a memory cgroup inside this process's own, of either version; raises OSError where that is not allowed."""
    own = Path("/proc/self/cgroup").read_text().splitlines()
    legacy = next((line.split(":", 2)[2] for line in own if "memory" in line.split(":")[1].split(",")), None)
    root = Path("/sys/fs/cgroup")
    parent = root / "memory" / legacy.strip("/") if legacy is not None else root / own[0].split(":", 2)[2].strip("/")
    group = Path(tempfile.mkdtemp(prefix="allstep-test-", dir=parent))
    try:
        if legacy is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit))
        else:
            (group / "memory.max").write_text(str(limit))
            (group / "memory.swap.max").write_text("0")
    except OSError:
        group.rmdir()
        raise
    return group


@pytest.fixture
def memory_group() -> Iterator[Path]:
    try:
        made = memory_cgroup(1500 * MIB)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield made
    made.rmdir()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=1m"):
        pytest.skip(f"a tmpfs cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(os.fsencode(folder), 2)


def test_row_36_a_rank_that_the_kernel_kills_for_memory_is_reported_so(memory_group: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside.py"
    inside.write_text(INSIDE)
    options = ["--fault", AT.allocate(8 * 2**30).to_text()]
    argv = command("allstep", SCRIPTS / "train.py", options=options)
    job = run(
        tmp_path, command=[sys.executable, inside, memory_group / "cgroup.procs", *argv], env={"OMP_NUM_THREADS": "1"}
    )
    assert job.code == 137, job.text
    check_first_lines(job, "rank 1 of 2 failed first", "SIGKILL", "likely out of memory")
    assert "likely out of memory: the kernel killed 1 process for it in this job's memory cgroup" in job.cause["note"]


@also_under_torchrun_by_night
@pytest.mark.nightly
def test_row_36_a_loaders_worker_that_the_kernel_kills_is_reported_so(
    memory_group: Path, tmp_path: Path, launcher: Launcher
) -> None:
    inside = tmp_path / "inside.py"
    inside.write_text(INSIDE)
    fault = FaultPlan.at(1, 9, when="data").allocate(8 * 2**30)
    argv = command(launcher, SCRIPTS / "loads.py", nproc=2)
    env = {"OMP_NUM_THREADS": "1"} | fault.to_environ()
    job = run(tmp_path, command=[sys.executable, inside, memory_group / "cgroup.procs", *argv], env=env)
    assert job.code != 0
    check_first_lines(job, "rank 1 of 2 failed first", "DataLoader worker", "likely out of memory: the kernel killed 1")


@also_under_torchrun_by_night
def test_row_36_memory_that_a_limit_denies_is_the_ranks_own_error(tmp_path: Path, launcher: Launcher) -> None:
    job = rehearse(tmp_path, "limited.py", fault=AT.allocate(64 * 2**30), launcher=launcher, within=BOUND)
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "MemoryError", "iteration 7")
    if launcher == "allstep":
        assert job.cause["note"] == "likely out of memory: its last lines have 'MemoryError'"


def test_row_45_a_named_folder_that_cannot_be_made_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    job = run(tmp_path, "--name", "job", SCRIPTS / "train.py")
    assert job.code == 2
    assert "no log can be written to runs/job" in job.err


def test_row_45_a_run_that_keeps_no_logs_still_shows_its_failure(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    fault = FaultPlan.at(0, 7).raise_(ValueError("bad batch"))
    job = run(tmp_path, "--fault", fault.to_text(), SCRIPTS / "train.py", env={"OMP_NUM_THREADS": "1"})
    assert job.code == 1
    check_first_lines(job, "rank 0 of 1 failed first", "ValueError: bad batch")
    assert "going on without logs" in job.err


def test_row_45_a_full_disk_leaves_the_failure_on_the_terminal(small_disk: Path, tmp_path: Path) -> None:
    fault = FaultPlan.at(1, 5).fill_disk(str(small_disk)) + AT.raise_(ValueError("bad batch"))
    job = rehearse(tmp_path, "train.py", fault=fault, options=["--runs", str(small_disk)])
    assert job.since(STRIKES) < NEVER
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", "iteration 7")
    for report in small_disk.rglob("failure.json"):
        assert json.loads(report.read_text())["cause"]["rank"] == 1
    assert not list(small_disk.rglob(".failure.json*"))


@pytest.mark.nightly
def test_row_45_a_folder_that_disappears_leaves_the_failure_on_the_terminal(tmp_path: Path) -> None:
    fault = FaultPlan.at(0, 7).raise_(ValueError("bad batch"))
    job = rehearse(tmp_path, "removes_its_folder.py", fault=fault, nproc=1)
    assert job.code == 1
    check_first_lines(job, "rank 0 of 1 failed first", "ValueError: bad batch", "iteration 7")
