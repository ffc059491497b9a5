"""What SLURM's queue and accounting say of jobs, as they print it."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from allstep.submission.job_states import ask_jobs, read_accounting, read_queue
from tests.run_control.records import programs


def test_lines_of_the_queue_are_read() -> None:
    text = "4711|RUNNING|None|2026-12-01T12:00:00|node[01-04]\n4712_3|PENDING|Priority|N/A|\n\nnoise\n"
    running, waiting = read_queue(text)
    assert (running.job, running.state, running.reason, running.nodes) == ("4711", "RUNNING", "", "node[01-04]")
    assert running.ends == datetime(2026, 12, 1, 12).timestamp()
    assert (waiting.job, waiting.state, waiting.reason, waiting.ends) == ("4712_3", "PENDING", "Priority", None)


def test_of_a_job_that_was_requeued_the_last_line_of_the_accounting_counts() -> None:
    text = "47|PREEMPTED|2026-12-01T12:00:00|n1\n47|CANCELLED by 1000|2026-12-01T13:00:00|n2\n"
    (job,) = read_accounting(text)
    assert (job.state, job.reason, job.nodes) == ("CANCELLED", "by 1000", "n2")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_a_job_that_left_the_queue_is_looked_for_in_the_accounting(slurm: Path) -> None:
    programs(slurm, squeue="printf '47|RUNNING|None|N/A|n1\\n'", sacct="printf '48|TIMEOUT|Unknown|n2\\n'")
    answer = ask_jobs(["47", "48"])
    assert {job: each.state for job, each in answer.jobs.items()} == {"47": "RUNNING", "48": "TIMEOUT"}


@pytest.mark.parametrize(
    ("squeue", "problem"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", ""),
        ("echo 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1", "does not answer"),
        ("exec sleep 60", "within 0.5 s"),
        ("echo 'permission denied' >&2; exit 1", "squeue: permission denied"),
    ],
)
def test_no_answer_is_an_answer(squeue: str, problem: str, slurm: Path) -> None:
    programs(slurm, squeue=squeue, sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    began = time.monotonic()
    answer = ask_jobs(["47"], within=0.5)
    assert time.monotonic() - began < 5
    assert answer.jobs == {}
    assert (problem in answer.problem) if problem else answer.problem == ""


def test_where_there_is_no_slurm_that_is_said_and_without_jobs_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_jobs([]).problem == ""
    assert ask_jobs(["47"]).problem == "there is no squeue here"
