"""Rows 10 and 13 to 17 of the fault matrix: the launcher ends, signals come early, late and often, and restarts."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.faults.jobs import LIMIT, STRIKES, rehearse, slowness, started
from tests.faults.reading import check_first_lines

pytestmark = pytest.mark.slow


def test_row_10_workers_are_gone_within_a_second_of_their_launchers_death_inside_a_collective_too(
    tmp_path: Path,
) -> None:
    fault = FaultPlan.at(rank=1, iteration=7).sleep(1000)
    with started(tmp_path, "train.py", fault=fault) as running:
        running.await_line(STRIKES)  # rank 0 waits for rank 1 in all_reduce
        workers = [pid for pid in running.pids() if pid != running.process.pid]
        assert len(workers) == 2
        watched = [os.pidfd_open(pid) for pid in workers]
        running.process.kill()
        killed = time.monotonic()
        for each in watched:
            assert select.select([each], [], [], LIMIT)[0]
            os.close(each)
        assert time.monotonic() - killed < slowness()
        assert running.pids() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_row_13_a_signal_repeated_escalates_and_orphans_nobody(tmp_path: Path, number: signal.Signals) -> None:
    fault = FaultPlan.at(when="start").ignore(number) + FaultPlan.at(iteration=7).sleep(1000)
    with started(tmp_path, "train.py", fault=fault, options=["--grace", "1000"]) as running:
        running.await_line("(step)", 2)
        running.process.send_signal(number)
        running.await_line("passed on to the workers")
        running.process.send_signal(number)
        running.process.send_signal(number)
        job = running.end()
    assert job.since("passed on") < job.bound()
    assert job.code == 128 + number
    assert job.left == []


def test_row_14_an_early_notice_is_not_fatal_and_is_remembered(tmp_path: Path) -> None:
    with started(tmp_path, "notices.py") as running:
        running.await_line("not yet imported", 2)
        running.process.send_signal(signal.SIGUSR1)
        (tmp_path / "go").touch()
        job = running.end()
    assert job.code == 0, job.text
    assert (
        job.text.count("stopped by rank 0: signal SIGUSR1") + job.text.count("stopped by rank 1: signal SIGUSR1") == 2
    )


def test_row_15_workers_that_ignore_term_are_killed_at_the_grace(tmp_path: Path) -> None:
    fault = FaultPlan.at(when="start").ignore(signal.SIGTERM)
    with started(tmp_path, "train.py", fault=fault, options=["--grace", "1"]) as running:
        running.await_line("training", 2)
        running.process.send_signal(signal.SIGTERM)
        job = running.end()
    assert 0.9 < job.since("SIGTERM: passed on") < 1.0 + job.bound()
    assert job.code == 143
    assert "ranks 0, 1 had to be killed" in job.text
    assert job.left == []


def test_row_16_a_run_that_fails_three_times_recovers(tmp_path: Path) -> None:
    fault = FaultPlan.at(1, 3, attempt=range(3)).raise_(ValueError("bad batch"))
    job = rehearse(tmp_path, "few_steps.py", "5", fault=fault, options=["--max-restarts", "3"])
    assert job.code == 0, job.text
    assert job.text.count("trained 5") == 2
    assert job.text.count(STRIKES) == 3
    assert job.report == {}  # of the last attempt
    assert sorted(path.name for path in tmp_path.glob("runs/job/attempt_*/failure.json")) == ["failure.json"] * 3


def test_row_17_a_crash_loop_ends_when_restarts_make_no_progress_and_says_so(tmp_path: Path) -> None:
    fault = FaultPlan.at(1, 3).raise_(ValueError("bad batch"))
    options = ["--max-restarts", "50", "--stop-after", "2"]
    job = rehearse(tmp_path, "few_steps.py", "5", fault=fault, options=options)
    assert job.code == 1
    assert len(list(tmp_path.glob("runs/job/attempt_*"))) == 3
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch")
    assert "2 restarts in a row got no further than epoch 1, iteration 3" in job.text


def test_a_launcher_that_is_told_a_wrong_fault_starts_nothing(tmp_path: Path) -> None:
    with started(tmp_path, "train.py", options=["--fault", "rank=1,iteraton=7,kill=9"]) as running:
        job = running.end()
    assert job.code == 2
    assert "iteraton=7" in job.text
    assert not (tmp_path / "runs").exists()
