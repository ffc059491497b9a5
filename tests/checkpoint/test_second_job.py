"""Issue 13 A3 and A4: real jobs that come to a folder while another one uses it, or after it has died there."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from allstep.checkpoint import entries
from tests.jobs.launchers import ROOT, script
from tests.jobs.running import Running, run, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

ENV = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}

TRAINS = """
import os, sys, time, torch
import allstep
from allstep import Checkpoint, Engine, Events

iterations, keep_last = int(sys.argv[1]), int(sys.argv[2])
with allstep.init() as world:
    engine = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint("c", {"engine": engine}, every=1, keep_last=keep_last).attach(engine)
    checkpoint.resume()

    @engine.on(Events.ITERATION_COMPLETED)
    def work() -> None:
        world.print("iteration", engine.state.iteration)
        while os.path.exists("hold") and engine.state.iteration >= 2:
            time.sleep(0.01)
        if os.path.exists("die") and engine.state.iteration == 3 and world.rank == 0:
            os.remove("die")
            os.kill(os.getpid(), 9)

    engine.run([0] * iterations)
"""


def steps(folder: Path) -> list[int]:
    return [entry.manifest.step for entry in entries(str(folder / "c")) if entry.manifest is not None]


def job(folder: Path, *more: str, iterations: int = 5, keep_last: int = 1) -> tuple[str | Path, ...]:
    return ("--nproc", "1", *more, script(folder, TRAINS), str(iterations), str(keep_last))


def holds(running: Running) -> None:
    running.await_line("iteration 2")


def test_a_second_job_is_refused_with_the_name_of_the_first_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    with started(tmp_path, *job(tmp_path, "--nproc", "2"), env=ENV) as first:
        holds(first)
        second = run(tmp_path, *job(tmp_path), env=ENV)
        assert second.code == 1
        assert re.search(
            r"FolderInUseError: the checkpoints in .* belong to a job that is alive: process \d+ on", second.text
        )
        (tmp_path / "hold").unlink()
        assert first.end().code == 0
    assert steps(tmp_path) == [5]


@pytest.mark.nightly
def test_a_job_that_is_taken_over_saves_no_more_and_ends_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    with started(tmp_path, *job(tmp_path, keep_last=9), env=ENV) as first:
        holds(first)
        with started(tmp_path, *job(tmp_path, "--take-over", iterations=7), env=ENV) as second:
            second.await_line("resumed from")
            second.await_line("iteration")
            (tmp_path / "hold").unlink()
            assert second.end().code == 0
        lost = first.end()
    assert lost.code == 1
    assert "FolderLostError" in lost.text
    assert steps(tmp_path)[-1] == 7


@pytest.mark.nightly
def test_a_restart_takes_the_folder_of_the_attempt_before_over_at_once(tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    done = run(tmp_path, *job(tmp_path, "--max-restarts", "1"), env=ENV)
    assert done.code == 0, done.text
    assert "waiting up to" not in done.text
    assert steps(tmp_path) == [5]


@pytest.mark.nightly
def test_a_job_that_was_killed_is_followed_at_once_on_its_machine(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    with started(tmp_path, *job(tmp_path), env=ENV) as first:
        holds(first)
        for pid in first.pids():
            os.kill(pid, signal.SIGKILL)
        first.end()
    (tmp_path / "hold").unlink()
    done = run(tmp_path, *job(tmp_path), env=ENV)
    assert done.code == 0, done.text
    assert "waiting up to" not in done.text


@pytest.mark.nightly
def test_a_copied_folder_is_free_once_its_claim_is_seen_not_to_be_renewed(tmp_path: Path) -> None:
    """The claim in a copy names a job that lives, so whoever uses the copy says that it is its own."""
    (tmp_path / "hold").touch()
    with started(tmp_path, *job(tmp_path), env=ENV) as first:
        holds(first)
        copy = tmp_path / "copy"
        copy.mkdir()
        shutil.copytree(tmp_path / "c", copy / "c")
        refused = run(copy, *job(copy), env=ENV)
        assert refused.code == 1
        assert "FolderInUseError" in refused.text
        taken = run(copy, *job(copy, "--take-over"), env=ENV)
        assert taken.code == 0, taken.text
        (tmp_path / "hold").unlink()
        assert first.end().code == 0
    assert steps(tmp_path) == steps(copy) == [5]


def test_resume_none_keeps_the_old_run(tmp_path: Path) -> None:
    assert run(tmp_path, *job(tmp_path, iterations=3), env=ENV).code == 0
    assert run(tmp_path, *job(tmp_path, "--resume", "none", iterations=8), env=ENV).code == 0
    assert steps(tmp_path) == [3, 8]
