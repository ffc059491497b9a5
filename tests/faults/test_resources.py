"""Rows 36 and 45 of the fault matrix: memory runs out, and a place for logs and reports that cannot be written."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.faults.jobs import SCRIPTS, STRIKES, command, rehearse, start
from tests.faults.reading import check_first_lines
from tests.launch.test_out_of_memory import memory_cgroup

pytestmark = pytest.mark.slow

MIB = 2**20
AT = FaultPlan.at(rank=1, iteration=7)
INSIDE = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


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
    fault = AT.allocate(8 * 2**30)
    job_command = command("allstep", 2, SCRIPTS / "train.py", ["--fault", fault.to_text()], [])
    with start(tmp_path, [sys.executable, str(inside), str(memory_group / "cgroup.procs"), *job_command]) as running:
        job = running.end()
    assert job.code == 137, job.text
    check_first_lines(job, "rank 1 of 2 failed first", "SIGKILL", "likely out of memory")
    assert job.left == []
    assert "likely out of memory" in job.cause["note"]


def test_row_36_memory_that_a_limit_denies_is_the_ranks_own_error(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "limited.py", fault=AT.allocate(64 * 2**30))
    assert job.since(STRIKES) < job.bound()
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "MemoryError", "iteration 7")


def test_row_45_a_folder_that_cannot_be_made_starts_nothing_where_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with start(tmp_path, command("allstep", 2, SCRIPTS / "train.py", [], [])) as running:
        job = running.end()
    assert job.code == 2
    assert "no log can be written to runs/job" in job.text


def test_row_45_a_run_that_keeps_no_logs_still_shows_its_failure(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    fault = AT.raise_(ValueError("bad batch"))
    argv = [sys.executable, "-m", "allstep", "run", "--nproc", "2", "--fault", fault.to_text()]
    with start(tmp_path, [*argv, str(SCRIPTS / "train.py")]) as running:
        job = running.end()
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch")
    assert "going on without logs" in job.text


def test_row_45_a_full_disk_leaves_the_failure_on_the_terminal_and_no_half_report(
    small_disk: Path, tmp_path: Path
) -> None:
    fault = FaultPlan.at(1, 5).fill_disk(str(small_disk)) + AT.raise_(ValueError("bad batch"))
    job = rehearse(tmp_path, "train.py", fault=fault, options=["--runs", str(small_disk)])
    assert job.since(STRIKES) < job.bound()
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", "iteration 7")
    for report in small_disk.rglob("failure.json"):
        assert json.loads(report.read_text())["cause"]["rank"] == 1
    assert not list(small_disk.rglob(".failure.json*"))


def test_row_45_a_folder_that_disappears_leaves_the_failure_on_the_terminal(tmp_path: Path) -> None:
    job = rehearse(tmp_path, "removes_its_folder.py", fault=AT.raise_(ValueError("bad batch")))
    assert job.code == 1
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", "iteration 7")
