"""Rows 10 and 13 to 17 of the fault matrix: the launcher ends, signals come early, late and often, and restarts."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from allstep.testing import FaultPlan
from tests.faults.rehearsal import NEVER, STRIKES, check_first_lines, fastest, rehearsal, rehearse
from tests.jobs.job import Job
from tests.jobs.processes import await_end, watch

pytestmark = pytest.mark.slow


def test_row_10_workers_in_a_collective_end_with_their_launcher(
    tmp_path: Path,
) -> None:
    fault = FaultPlan.at(rank=1, iteration=7).sleep(1000)

    def once(own: Path) -> tuple[float, Job]:
        with rehearsal(own, "train.py", fault=fault) as running:
            running.await_line(STRIKES)  # rank 0 waits for rank 1 in all_reduce
            workers = running.pids()[1:]
            assert len(workers) == 2
            watched = watch(workers)
            running.process.kill()
            killed = time.monotonic()
            gone = await_end(watched, NEVER)
            return gone - killed, running.end()

    fastest(tmp_path, once, within=1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_row_13_a_signal_repeated_escalates_and_orphans_nobody(tmp_path: Path, number: signal.Signals) -> None:
    fault = FaultPlan.at(when="start").ignore(number) + FaultPlan.at(iteration=7).sleep(1000)
    with rehearsal(tmp_path, "train.py", fault=fault, options=["--grace", "1000"]) as running:
        running.await_line("(step)", 2)
        running.process.send_signal(number)
        running.await_line("passed on to the workers")
        running.process.send_signal(number)
        running.process.send_signal(number)
        job = running.end()
    assert job.since("passed on") < NEVER
    assert job.code == 128 + number


def test_row_14_an_early_notice_is_not_fatal_and_is_remembered(tmp_path: Path) -> None:
    with rehearsal(tmp_path, "notices.py") as running:
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
    with rehearsal(tmp_path, "train.py", fault=fault, options=["--grace", "1"]) as running:
        running.await_line("training", 2)
        running.process.send_signal(signal.SIGTERM)
        job = running.end()
    assert 0.9 < job.since("SIGTERM: passed on") < NEVER  # 30 s by default
    assert job.code == 143
    assert "ranks 0, 1 had to be killed" in job.text


@pytest.mark.timeout(900)
@pytest.mark.nightly
def test_row_16_runs_that_fail_three_times_all_recover(tmp_path: Path) -> None:
    fault = FaultPlan.at(1, 3, attempt=range(3)).raise_(ValueError("bad batch"))
    count = 20
    for first in range(0, count, 3):
        with contextlib.ExitStack() as stack:
            jobs = []
            for number in range(first, min(count, first + 3)):
                own = tmp_path / str(number)
                own.mkdir()
                options = ["--max-restarts", "3"]
                jobs.append(stack.enter_context(rehearsal(own, "reduces.py", "5", fault=fault, options=options)))
            for each in jobs:
                assert_recovered(each.end())


def assert_recovered(job: Job) -> None:
    assert job.code == 0, job.text
    assert job.text.count("trained 5") == 2
    assert job.text.count(STRIKES) == 3
    assert "run job succeeded after 3 restarts" in job.err
    assert job.report == {}  # of the last attempt
    reports = sorted(job.folder.glob("runs/job/attempt_*/failure.json"))
    assert [path.parent.name for path in reports] == ["attempt_0", "attempt_1", "attempt_2"]
    assert all(json.loads(path.read_text())["cause"]["what"] == "ValueError: bad batch" for path in reports)


@pytest.mark.parametrize(
    ("fault", "attempts", "place"),
    [
        (FaultPlan.at(1, 3), 3, "epoch 1, iteration 3"),
        pytest.param(FaultPlan.at(1, 3, attempt=0), 4, "epoch 1, iteration 4", marks=pytest.mark.nightly),
    ],
    ids=["never further", "further once"],
)
def test_row_17_a_crash_loop_ends_when_restarts_make_no_progress_and_says_so(
    tmp_path: Path, fault: Any, attempts: int, place: str
) -> None:
    error = ValueError("bad batch")
    plan = fault.raise_(error) + FaultPlan.at(1, 4).raise_(error)
    options = ["--max-restarts", "50", "--stop-after", "2"]
    job = rehearse(tmp_path, "reduces.py", "5", fault=plan, options=options)
    assert job.code == 1
    assert len(list(job.folder.glob("runs/job/attempt_*"))) == attempts
    check_first_lines(job, "rank 1 of 2 failed first", "ValueError: bad batch", place)
    assert f"2 restarts in a row got no further than {place}" in job.text


def test_a_launcher_that_is_told_a_wrong_fault_starts_nothing(tmp_path: Path) -> None:
    with rehearsal(tmp_path, "train.py", options=["--fault", "rank=1,iteraton=7,kill=9"]) as running:
        job = running.end()
    assert job.code == 2
    assert "iteraton=7" in job.text
    assert not (tmp_path / "runs").exists()
