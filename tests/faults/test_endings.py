"""How a run ends and what its next start makes of it: finished, failed, out of time; and signals that come again."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from allstep.checkpoint import entries, verify
from allstep.exit_codes import PREEMPTED
from allstep.testing import run_ranks
from tests.checkpoint.training import go_on
from tests.jobs.job import Job
from tests.jobs.running import Running, run, start, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
JOB = ["-m", "tests.faults.ending_job"]
LIMIT = 120.0


def ended(folder: Path, *arguments: str, ranks: int = 2) -> Job:
    """Run the job to its end; it goes on from what another one saved."""
    done = run(folder, "--nproc", str(ranks), *JOB, folder / "saved", *arguments, env=ENV)
    assert done.code == 0, done.err
    return done


def left(folder: Path) -> range:
    """Train what an earlier job left of the run, without the script: the iterations that it took."""
    return run_ranks(go_on, 2, str(folder / "saved"))[0][1]


def iterations(text: str) -> set[int]:
    return {int(each) for each in re.findall(r"iteration (\d+)$", text, re.M)}


def steps(folder: Path) -> list[int]:
    """The iterations of all whole checkpoints, which is every one that is there."""
    found = [each for each in entries(str(folder / "saved")) if each.state != "unfinished"]
    assert [verify(each) for each in found] == [[]] * len(found)
    return [each.manifest.step for each in found if each.manifest is not None]


@pytest.mark.nightly
def test_a_run_that_stopped_early_is_finished_and_trains_nothing_more(tmp_path: Path) -> None:
    first = ended(tmp_path, "every=epoch", "patience=1")
    second = ended(tmp_path, "every=epoch", "patience=1", ranks=1)
    assert max(iterations(first.out)) == 10  # of 15: the second epoch was no better
    assert first.out.count("ended: finished, rank 0: no better score than 0.0 in 1 times") == 2
    assert iterations(second.out) == set()
    assert "nothing to run: the run was finished: rank 0: no better score than 0.0 in 1 times" in second.err


@pytest.mark.nightly
def test_a_run_that_was_out_of_time_goes_on(tmp_path: Path) -> None:
    first, second = (ended(tmp_path, "limit=0.001", "every=epoch") for _ in range(2))
    assert "ended: left, " in first.out
    assert min(iterations(second.out)) == max(iterations(first.out)) + 1


@pytest.mark.nightly
def test_a_run_that_became_nan_is_not_saved_there_and_goes_on_from_before(tmp_path: Path) -> None:
    first = ended(tmp_path, "nan=5", "every=2 iterations")
    assert "ended: failed, " in first.out
    assert "not saved, since the run has failed: rank 0: the output of iteration 5 is not finite" in first.err
    assert steps(tmp_path) == [2, 4]
    assert left(tmp_path)[0] == 5


def alone(folder: Path, *arguments: str) -> AbstractContextManager[Running]:
    """The job under plain `python`."""
    return start(folder, [sys.executable, *JOB, folder / "saved", *arguments], env=ENV)


def test_under_python_a_second_signal_lets_saves_be_committed(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with alone(tmp_path, f"gate={gate}", "together=0") as job:
        job.await_line("waits with tmp-save-000002")
        job.process.send_signal(signal.SIGTERM)
        job.process.send_signal(signal.SIGUSR1)
        gate.touch()
        done = job.end()
    assert done.code == PREEMPTED, done.err
    saved = steps(tmp_path)
    assert saved[:2] == [2, 4]
    assert max(saved) == max(iterations(done.out), default=4)  # where it stopped


@pytest.mark.nightly
def test_under_python_further_signals_kill_and_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    with alone(tmp_path, f"gate={tmp_path / 'gate'}", "together=0") as job:
        job.await_line("waits with tmp-save-000002")
        until = time.monotonic() + LIMIT
        while job.process.poll() is None and time.monotonic() < until:  # two that are pending are one
            job.process.send_signal(signal.SIGTERM)
            time.sleep(0.02)  # signals that go on, not one that is pending
        assert job.end().code == -signal.SIGTERM
    assert steps(tmp_path) == [2]
    again = run(tmp_path, *JOB, tmp_path / "saved", env=ENV)
    assert again.code == 0, again.err
    assert "resumed from save-000001-step-2" in again.err
    assert "tmp-save-000002" in again.err  # what is left of the other is swept away
    assert min(iterations(again.out)) == 3


@pytest.mark.nightly
def test_under_allstep_run_a_second_term_kills_and_leaves_a_whole_checkpoint(
    tmp_path: Path,
) -> None:
    arguments = [tmp_path / "saved", f"gate={tmp_path / 'gate'}"]
    with started(tmp_path, "--nproc", "2", "--grace", "1000", *JOB, *arguments, env=ENV) as job:
        job.await_line("waits with tmp-save-000002", 2)
        job.process.send_signal(signal.SIGTERM)
        job.await_line("a second signal ends them at once")
        job.process.send_signal(signal.SIGTERM)
        done = job.end()
    assert done.code == 128 + signal.SIGTERM
    assert "ranks 0, 1 had to be killed" in done.err
    assert steps(tmp_path) == [2]
    assert left(tmp_path)[0] == 3


@pytest.mark.nightly
def test_under_allstep_run_a_notice_then_a_term_save_what_was_trained(
    tmp_path: Path,
) -> None:
    arguments = [tmp_path / "saved", "evaluate=1000000", "every=epoch"]
    with started(tmp_path, "--nproc", "2", "--grace", "1000", *JOB, *arguments, env=ENV) as job:
        job.await_line("evaluates", 2)
        job.process.send_signal(signal.SIGUSR1)
        job.process.send_signal(signal.SIGTERM)
        done = job.end()
    assert done.code == PREEMPTED, done.err
    assert steps(tmp_path)[-1] == 5
