"""A run's state, from its record, its launcher's process and SLURM; each may be missing, or contradict the others."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from allstep.run_control.run_search import FoundRun, read_run
from allstep.run_control.run_status import FRESH_S, RunStatus, judge_state, status_of, statuses
from allstep.run_record.process_identity import identity_of
from allstep.run_record.run_history import history_of
from allstep.submission.job_states import JobState, JobStates
from tests.run_control.records import ELSEWHERE, Record, programs, submitted

NOW = 1000.0
BEGUN: tuple[str, dict[str, Any]] = ("attempt", {"attempt": 0, "job": "47", "process": {"host": "far"}})
PREEMPTED: tuple[str, dict[str, Any]] = ("end", {"outcome": "preempted", "code": 85})


def history(*said: tuple[str, dict[str, Any]], ago: float = 10.0) -> Any:
    return history_of(
        {}, [{"n": n, "time": NOW - ago, "kind": kind, "attempt": 0, **more} for n, (kind, more) in enumerate(said)]
    )


def found(record: Record) -> FoundRun:
    run = read_run(record.folder)
    assert run is not None
    return run


@pytest.mark.parametrize(
    ("said", "slurm", "state"),
    [
        ((), "PENDING", "queued"),
        ((), "RUNNING", "starting"),
        ((BEGUN,), "RUNNING", "running"),
        ((BEGUN,), "SUSPENDED", "running"),
        ((BEGUN, ("signal", {"signal": "SIGUSR1"})), "RUNNING", "stopping"),
        ((BEGUN, PREEMPTED), "RUNNING", "stopping"),
        ((BEGUN, PREEMPTED), "PENDING", "queued"),
        ((BEGUN, PREEMPTED), "FAILED", "preempted"),
        ((BEGUN,), "TIMEOUT", "timed out"),
        ((BEGUN,), "NODE_FAIL", "node failed"),
        ((BEGUN,), "CANCELLED", "cancelled"),
        ((), "CANCELLED", "cancelled"),
        ((BEGUN, ("end", {"outcome": "failed", "code": 1})), "COMPLETED", "failed"),
    ],
)
def test_slurm_and_the_record_together_give_the_state(said: Any, slurm: str, state: str) -> None:
    judged = judge_state(history(*said), JobState("47", slurm), is_known=True, alive=None, now=NOW)
    assert judged[0] == state


@pytest.mark.parametrize(
    ("said", "alive", "ago", "state"),
    [
        ((BEGUN,), True, 9999.0, "running"),
        ((BEGUN, ("signal", {"signal": "SIGTERM"})), True, 1.0, "stopping"),
        ((BEGUN, ("attempt_end", {"outcome": "failed", "code": 1})), True, 1.0, "starting"),
        ((BEGUN,), False, 1.0, "killed"),
        ((BEGUN,), None, 1.0, "running"),
        ((BEGUN,), None, FRESH_S + 1, "silent"),
        ((BEGUN, ("end", {"outcome": "stopped", "code": 143})), False, 1.0, "stopped"),
        ((), None, 1.0, "unknown"),
    ],
)
def test_without_slurm_the_launcher_s_process_counts(said: Any, alive: bool | None, ago: float, state: str) -> None:
    assert judge_state(history(*said, ago=ago), None, is_known=True, alive=alive, now=NOW)[0] == state


def test_a_job_that_slurm_forgot_and_that_said_no_end_was_killed() -> None:
    assert judge_state(history(BEGUN), None, is_known=False, alive=None, now=NOW)[0] == "killed"


def test_where_a_run_is_and_how_long_it_still_takes(tmp_path: Path) -> None:
    record = Record(tmp_path, "r", process=ELSEWHERE, job="47")
    record.attempt().progress(40, goal=100, rate=2.0).save(30)
    run = found(record)
    now = time.time()
    job = JobState("47", "RUNNING", ends=now + 600, nodes="n[1-2]")
    status = status_of(run, JobStates({"47": job}), now)
    assert (status.state, status.nodes, status.job, status.world) == ("running", "n[1-2]", "47", 2)
    assert (status.epoch, status.iteration, status.goal, status.rate, status.left) == (2, 40, 100, 2.0, 30.0)
    assert status.limit == pytest.approx(600)
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.checkpoint.address) == (30, "/c/save-30")


def test_a_run_that_is_over_has_no_rate_and_no_time_left(tmp_path: Path) -> None:
    record = Record(tmp_path, "r").attempt().progress(40, goal=100, rate=2.0).fail().end("failed", 137, attempt=False)
    status = status_of(found(record), JobStates(), time.time())
    assert (status.state, status.why) == ("failed", "exit code 137")
    assert (status.rate, status.left, status.limit) == (None, None, None)
    assert status.failure is not None
    assert status.failure.what == "rank 1: killed by SIGKILL"


def test_a_controller_that_hangs_is_an_answer_within_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, squeue="exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    record = Record(tmp_path / "runs", "r", process=ELSEWHERE, job="47", ago=1.0).attempt()
    began = time.monotonic()
    (status,) = statuses([found(record)], within=0.5)
    assert time.monotonic() - began < 10
    assert status.state == "running"
    assert "squeue did not answer within 0.5 s" in status.why


def test_slurm_is_asked_once_about_all_and_not_about_what_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, squeue="printf '47|PENDING|Priority|N/A|\\n48|RUNNING|None|N/A|n1\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runs = tmp_path / "runs"
    every = [
        Record(runs, "over", job="46").attempt().end(),
        Record(runs, "queued", job="47").attempt().end("preempted", 85),
        Record(runs, "on", job="48", process=ELSEWHERE).attempt(),
    ]
    assert [each.state for each in statuses(list(map(found, every)))] == ["finished", "queued", "running"]
    (call,) = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=47,48" in call


def test_members_of_an_array_that_wait_are_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, squeue="printf '50_1|PENDING|Resources|N/A|\\n50_0|RUNNING|None|N/A|n1\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runs = tmp_path / "runs"
    submitted(runs, "sweep", "50", array="0-1")
    begun = Record(runs, "sweep-0", job="50_0", process=ELSEWHERE).attempt()
    array = read_run(runs / "sweep")
    assert array is not None
    shown = {each.run: (each.state, each.job) for each in statuses([array, found(begun)])}
    assert shown == {"sweep-0": ("running", "50_0"), "sweep-1": ("queued", "50_1")}


def test_a_run_whose_launcher_lives_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path, "r", process=identity_of(os.getpid()), ago=9999.0).attempt()
    (status,) = statuses([found(record)])
    assert isinstance(status, RunStatus)
    assert status.state == "running"
