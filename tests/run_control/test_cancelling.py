"""Who is told what when a run is cancelled: real processes here, SLURM's commands as scripts that note their call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from allstep.errors import RunControlError
from allstep.run_control.cancelling import cancel
from allstep.run_control.run_search import read_run
from allstep.run_control.run_status import statuses
from allstep.run_record.process_identity import identity_of
from allstep.submission.job_record import JobRecord
from tests.run_control.records import ELSEWHERE, Record, asked, programs, submitted

# Counts what it is told, and goes at the second SIGTERM as `allstep run` does.
SUPERVISOR = """
import signal, sys
told = []
def tell(number, frame):
    told.append(number)
    print("told", flush=True)
    if len(told) == int(sys.argv[1]):
        sys.exit(0)
signal.signal(signal.SIGTERM, tell)
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    programs(folder, squeue="printf '47|RUNNING|None|N/A|n1\\n'", scancel="")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def supervisor(goes_at: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SUPERVISOR, str(goes_at)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def told(folder: Path, *, now: bool = False) -> str:
    run = read_run(folder)
    assert run is not None
    (status,) = statuses([run])
    return cancel(run, status, now=now)


def test_a_supervisor_is_told_once_to_save_and_stop(tmp_path: Path) -> None:
    for process in supervisor(2):
        record = Record(tmp_path, "r", process=identity_of(process.pid)).attempt()
        assert f"process {process.pid} is told to save and stop" in told(record.folder)
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
        assert process.poll() is None


def test_at_once_a_supervisor_is_told_until_it_is_gone(tmp_path: Path) -> None:
    for process in supervisor(2):
        record = Record(tmp_path, "r", process=identity_of(process.pid)).attempt()
        assert "gone" in told(record.folder, now=True)
        assert process.wait(5) == 0


def test_another_process_that_has_the_number_is_left_alone(tmp_path: Path) -> None:
    for process in supervisor(1):
        record = Record(tmp_path, "r", process={**identity_of(process.pid), "started": "1"}).attempt()
        with pytest.raises(RunControlError, match="is over: killed"):
            told(record.folder)
        assert process.poll() is None


def test_a_run_of_another_machine_is_to_be_cancelled_there(tmp_path: Path) -> None:
    record = Record(tmp_path, "r", process=ELSEWHERE, ago=1).attempt()
    with pytest.raises(RunControlError, match="was started on far"):
        told(record.folder)


def test_what_is_over_is_not_cancelled(tmp_path: Path) -> None:
    with pytest.raises(RunControlError, match="is over: finished"):
        told(Record(tmp_path, "r").attempt().end().folder)


def test_a_submitted_job_is_told_by_its_own_process_and_not_started_again(tmp_path: Path, slurm: Path) -> None:
    record = Record(tmp_path, "r", process=ELSEWHERE, job="47").attempt()
    JobRecord(record.folder).begin("47", 1)
    assert "job 47 is told to save and stop" in told(record.folder)
    assert asked(slurm)[-1] == "scancel --signal=USR1 --batch 47"
    assert JobRecord(record.folder).is_cancelled
    JobRecord(record.folder).begin("47", 1)  # submitted once more, by a person
    assert not JobRecord(record.folder).is_cancelled


def test_of_another_job_the_tasks_are_told(tmp_path: Path, slurm: Path) -> None:
    record = Record(tmp_path, "r", process=ELSEWHERE, job="47").attempt()
    told(record.folder)
    assert asked(slurm)[-1] == "scancel --signal=USR1 47"


def test_at_once_a_job_is_cancelled_without_a_save(tmp_path: Path, slurm: Path) -> None:
    record = Record(tmp_path, "r", process=ELSEWHERE, job="47").attempt()
    assert "is cancelled" in told(record.folder, now=True)
    assert asked(slurm)[-1] == "scancel 47"


def test_a_job_that_waits_is_taken_out_of_the_queue(tmp_path: Path, slurm: Path) -> None:
    programs(slurm, squeue="printf '47|PENDING|Priority|N/A|\\n'")
    assert "is cancelled" in told(submitted(tmp_path, "r", "47"))
    assert asked(slurm)[-1] == "scancel 47"


def test_a_run_in_a_shell_of_slurm_s_is_ended_and_the_shell_is_not(tmp_path: Path, slurm: Path) -> None:
    for process in supervisor(1):
        record = Record(tmp_path, "r", process=identity_of(process.pid), job="47").attempt()
        assert "told to save" in told(record.folder)
        assert process.wait(5) == 0
    assert not any("scancel" in call for call in asked(slurm))


def test_a_controller_that_refuses_is_an_error_in_its_own_words(tmp_path: Path, slurm: Path) -> None:
    programs(slurm, scancel="echo 'Access/permission denied' >&2; exit 1")
    record = Record(tmp_path, "r", process=ELSEWHERE, job="47").attempt()
    with pytest.raises(RunControlError, match="was not cancelled: Access/permission denied"):
        told(record.folder)


def test_a_controller_that_is_away_is_an_error_before_anything_is_done(tmp_path: Path, slurm: Path) -> None:
    programs(slurm, squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(RunControlError, match="controller does not answer"):
        told(submitted(tmp_path, "r", "47"))
    assert os.listdir(tmp_path / "r") == ["submission.json"]
