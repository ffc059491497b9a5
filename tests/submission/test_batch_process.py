"""The process of a job, with steps that are shell scripts and a SLURM that is three of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from allstep.protocol.save_record import SAVES, note_save
from allstep.submission import batch_process
from allstep.submission.batch_process import BatchProcess
from allstep.submission.job_record import JobRecord

STEP = """
import os, signal, sys
from allstep.protocol.save_record import note_save
def leave(*_):
    if "save" in sys.argv:
        note_save(9, 0.1, os.environ)
    sys.exit(85)
signal.signal(signal.SIGUSR1, leave)
print("measures", os.environ.get("ALLSTEP_MEASURE_SAVE"), flush=True)
os.kill(os.getppid(), signal.SIGUSR1) if "notify" in sys.argv else None
signal.pause()
"""


class Slurm:
    """What squeue, scontrol and sbatch say; and a job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.says(state="RUNNING", end="N/A")
        self.program("scontrol", f'echo "$@" >> {folder}/asked')
        self.program("sbatch", f'echo sbatch "$@" >> {folder}/asked; echo 48')

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / name).chmod(0o755)

    def says(self, state: str, end: str) -> None:
        self.program("squeue", f'case "$*" in *%T*) echo {state};; *) echo {end};; esac')

    def asked(self) -> str:
        return (self.folder / "asked").read_text() if (self.folder / "asked").exists() else ""

    def run(self, *step: str, script: str = STEP, **how: Any) -> int:
        process = BatchProcess(self.folder, "47", self.folder / "job.sh", **{"margin": 0.0, "chain": False, **how})
        return process.run([sys.executable, "-c", script, *step])

    def last(self) -> str:
        return str(json.loads((self.folder / "starts.jsonl").read_text().splitlines()[-1])["what"])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setattr(batch_process, "_SETTLE_S", 0.0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "47")
    monkeypatch.setenv(SAVES, str(tmp_path / "saves.jsonl"))
    return Slurm(tmp_path)


def test_a_notice_stops_the_step_and_the_job_is_requeued(slurm: Slurm) -> None:
    assert slurm.run("save", "notify") == 85
    assert slurm.asked() == "requeue 47\n"
    assert slurm.last() == "stopped; the job is put back into its queue"


def test_a_notice_is_heard_where_the_script_ignored_it_so_far(slurm: Slurm) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert slurm.run("save", "notify") == 85
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert slurm.asked() == "requeue 47\n"


def test_the_end_of_the_jobs_time_is_a_notice_too(slurm: Slurm, capfd: pytest.CaptureFixture[str]) -> None:
    slurm.says("RUNNING", (datetime.now() + timedelta(seconds=8)).isoformat(timespec="seconds"))
    assert slurm.run("save") == 85
    assert "the job's time ends" in capfd.readouterr().err
    assert slurm.asked() == "requeue 47\n"


def test_a_job_that_used_up_its_time_and_got_no_further_ends_with_93(slurm: Slurm) -> None:
    slurm.says("RUNNING", (datetime.now() + timedelta(seconds=8)).isoformat(timespec="seconds"))
    assert slurm.run() == 93
    assert slurm.asked() == ""
    assert "used up its time" in slurm.last()


def test_slurms_own_notice_in_the_last_minute_is_one_of_time(slurm: Slurm) -> None:
    slurm.says("RUNNING", (datetime.now() + timedelta(seconds=50)).isoformat(timespec="seconds"))
    assert slurm.run("notify") == 93
    assert "used up its time" in slurm.last()


def test_a_job_that_is_preempted_early_has_not_used_up_its_time(slurm: Slurm) -> None:
    slurm.says("RUNNING", (datetime.now() + timedelta(seconds=50)).isoformat(timespec="seconds"))
    (slurm.folder / "squeue").rename(slurm.folder / "preempted")
    slurm.says("RUNNING", (datetime.now() + timedelta(hours=1)).isoformat(timespec="seconds"))
    preempt = f"import os; os.rename('{slurm.folder}/preempted', '{slurm.folder}/squeue')\n"
    assert slurm.run("notify", script=preempt + STEP) == 85
    assert slurm.asked() == "requeue 47\n"


def test_three_starts_without_a_save_are_enough(slurm: Slurm) -> None:
    assert [slurm.run("notify") for _ in range(3)] == [85, 85, 93]
    assert slurm.asked() == "requeue 47\n" * 2


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_was_cancelled_does_not_come_back(state: str, slurm: Slurm) -> None:
    slurm.says(state, "N/A")
    assert slurm.run("save", "notify") == 85
    assert slurm.asked() == ""
    assert f"SLURM calls the job {state}" in slurm.last()


def test_a_start_that_a_person_cancelled_is_the_last(slurm: Slurm) -> None:
    threading.Timer(0.5, JobRecord(slurm.folder).cancel).start()
    slow = "import time; time.sleep(1.0)\n" + STEP
    assert slurm.run("save", "notify", script=slow) == 93
    assert slurm.asked() == ""
    assert slurm.last() == "stopped and not started again: it was cancelled"


def test_a_chain_goes_on_in_a_new_job_behind_this_one(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "47")  # the member that has the array's number
    assert slurm.run("save", "notify", chain=True) == 85
    assert slurm.asked() == f"sbatch --parsable --dependency=afterany:47_3 --array=3 {slurm.folder}/job.sh\n"
    assert slurm.last() == "stopped; goes on in job 48"


def test_a_requeue_that_is_refused_is_said_with_the_remedy(slurm: Slurm) -> None:
    slurm.program("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    assert slurm.run("save", "notify") == 85
    assert "presently disabled; submit with --chain" in slurm.last()


def test_a_controller_that_restarts_is_waited_for(slurm: Slurm) -> None:
    is_first = f"[ -e {slurm.folder}/once ] || {{ touch {slurm.folder}/once"
    once = f"{is_first}; echo 'Unable to contact slurm controller' >&2; exit 1; }}"
    slurm.program("scontrol", f'{once}\necho "$@" >> {slurm.folder}/asked')
    assert slurm.run("save", "notify") == 85
    assert slurm.asked() == "requeue 47\n"


def test_a_start_that_slurm_has_given_up_leaves_the_job_to_the_next(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_process, "_RECORD_LOOK_S", 0.05)
    later = f"echo '{json.dumps({'job': '47', 'nodes': 1, 'saved': -1, 'time': 0})}' >> {slurm.folder}/starts.jsonl"
    step = f"import os, signal; os.system({later!r}); signal.pause()"
    assert slurm.run(script=step) == 85
    assert "a later start has begun, so this one ends" in capfd.readouterr().err
    assert slurm.asked() == ""
    assert "ended" not in (slurm.folder / "starts.jsonl").read_text()


@pytest.mark.parametrize(("code", "what"), [(0, "finished"), (3, "failed with exit code 3")])
def test_a_step_that_ends_by_itself_has_its_own_code(code: int, what: str, slurm: Slurm) -> None:
    assert slurm.run(script=f"raise SystemExit({code})") == code
    assert slurm.last() == what
    assert slurm.asked() == ""


def test_a_save_is_measured_only_where_none_was(slurm: Slurm, capfd: pytest.CaptureFixture[str]) -> None:
    slurm.run("notify")
    assert "measures 1" in capfd.readouterr().out
    note_save(3, 0.5, os.environ)
    slurm.run("notify")
    assert "measures None" in capfd.readouterr().out


def test_a_signal_that_comes_at_once_waits_until_tasks_can_hear_it(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_process, "_SETTLE_S", 1.5)
    hears_late = "import signal, sys, time; time.sleep(0.7)\n" + STEP
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    assert slurm.run("save", script=hears_late) == 85
    assert slurm.last() == "stopped; the job is put back into its queue"
