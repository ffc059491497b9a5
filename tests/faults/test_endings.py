"""How a run ends and what its next start makes of it: finished, failed, out of time; and signals that come again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from allstep.checkpoint import entries, verify
from allstep.exit_codes import PREEMPTED
from tests.launch.command import alive, environment, run, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
JOB = ["-m", "tests.faults.ending_job"]
LIMIT = 120.0


def twice(folder: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Start the same job over two ranks, and again when it has ended."""
    return [run(folder, "--nproc", "2", *JOB, folder / "saved", *arguments, env=ENV) for _ in range(2)]


def iterations(text: str) -> set[int]:
    return {int(each) for each in re.findall(r"iteration (\d+)$", text, re.M)}


def steps(folder: Path) -> list[int]:
    """The iterations of all whole checkpoints, which is every one that is there."""
    found = [each for each in entries(str(folder / "saved")) if each.state != "unfinished"]
    assert [verify(each) for each in found] == [[]] * len(found)
    return [each.manifest.step for each in found if each.manifest is not None]


def test_a_run_that_stopped_early_is_finished_says_so_when_started_again_and_trains_nothing(tmp_path: Path) -> None:
    first, second = twice(tmp_path, "every=epoch", "patience=1")
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert max(iterations(first.stdout)) == 10  # of 15: the second epoch was no better
    assert first.stdout.count("ended: finished, rank 0: no better score than 0.0 in 1 times") == 2
    assert iterations(second.stdout) == set()
    assert "nothing to run: the run was finished: rank 0: no better score than 0.0 in 1 times" in second.stderr


def test_a_run_that_was_out_of_time_goes_on(tmp_path: Path) -> None:
    first, second = twice(tmp_path, "limit=0.001", "every=epoch")
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert "ended: left, " in first.stdout
    assert min(iterations(second.stdout)) == max(iterations(first.stdout)) + 1


def test_a_run_that_became_nan_is_not_saved_there_and_goes_on_from_before(tmp_path: Path) -> None:
    first, second = twice(tmp_path, "nan=5", "every=2 iterations")
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert "ended: failed, " in first.stdout
    assert "not saved, since the run has failed: rank 0: the output of iteration 5 is not finite" in first.stderr
    assert min(iterations(second.stdout)) == 5
    assert steps(tmp_path) == [2, 4]


@contextmanager
def alone(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The job under plain `python`."""
    process = subprocess.Popen(
        [sys.executable, *JOB, str(folder / "saved"), *arguments],
        cwd=folder,
        env=environment(ENV),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], text: str, count: int = 1) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        count -= text in line
        if not count:
            return
    assert process.stderr is not None
    raise AssertionError(f"{text!r} never came: {process.stderr.read()}")


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_under_python_a_second_signal_leaves_a_save_under_way_and_the_last_one_to_be_committed(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with alone(tmp_path, f"gate={gate}", "together=0") as process:
        wait_for(process, "waits with tmp-save-000002")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        gate.touch()
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == PREEMPTED, err
    saved = steps(tmp_path)
    assert saved[:2] == [2, 4]
    assert max(saved) == max(iterations(out), default=4)  # where it stopped


def test_under_python_signals_that_go_on_kill_and_the_newest_committed_checkpoint_is_whole(tmp_path: Path) -> None:
    with alone(tmp_path, f"gate={tmp_path / 'gate'}", "together=0") as process:
        wait_for(process, "waits with tmp-save-000002")
        until = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < until:  # two that are pending are one
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
    assert process.returncode == -signal.SIGTERM
    assert steps(tmp_path) == [2]
    again = run(tmp_path, *JOB, tmp_path / "saved", env=ENV)
    assert again.returncode == 0, again.stderr
    assert "resumed from save-000001-step-2" in again.stderr
    assert "tmp-save-000002" in again.stderr  # what is left of the other is swept away
    assert min(iterations(again.stdout)) == 3


def test_under_allstep_run_a_second_term_ends_all_at_once_and_the_newest_committed_checkpoint_is_whole(
    tmp_path: Path,
) -> None:
    arguments = [tmp_path / "saved", f"gate={tmp_path / 'gate'}"]
    with started(tmp_path, "--nproc", "2", "--grace", "1000", *JOB, *arguments, env=ENV) as process:
        wait_for(process, "waits with tmp-save-000002", 2)
        workers = children(process)
        assert len(workers) == 2
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        while "a second signal ends them at once" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGTERM
    assert "ranks 0, 1 had to be killed" in err
    assert not any(map(alive, workers))
    assert steps(tmp_path) == [2]
    again = run(tmp_path, "--nproc", "2", *JOB, tmp_path / "saved", env=ENV)
    assert again.returncode == 0, again.stderr
    assert min(iterations(again.stdout)) == 3


def test_under_allstep_run_a_notice_and_then_a_term_end_the_evaluation_and_save_what_was_trained(
    tmp_path: Path,
) -> None:
    arguments = [tmp_path / "saved", "evaluate=1000000", "every=epoch"]
    with started(tmp_path, "--nproc", "2", "--grace", "1000", *JOB, *arguments, env=ENV) as process:
        wait_for(process, "evaluates", 2)
        workers = children(process)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == PREEMPTED, err
    assert not any(map(alive, workers))
    assert steps(tmp_path)[-1] == 5
