"""What is written into a record, what is kept out of it, and where it lies for ranks without `allstep run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from allstep.protocol.messages import CheckpointSaved
from allstep.run_record.event_log import read_events
from allstep.run_record.process_identity import identity_of, is_alive
from allstep.run_record.recorder import FailureSummary, RunRecorder, about_run
from allstep.run_record.run_folders import folder_of_ranks


def about(**other: Any) -> dict[str, Any]:
    given = {"name": "r", "run_id": "1", "launcher": "torchrun", "command": ["t.py"], "process": {"pid": 1}, "job": ""}
    return about_run(**{**given, **other})


def begun(recorder: RunRecorder, attempt: int = 0) -> None:
    recorder.attempt_began(attempt, world=2, nodes=1, launcher="allstep", process={"pid": 1}, job="")


def test_secrets_are_in_neither_file(tmp_path: Path) -> None:
    said: list[str] = []
    command = ["train.py", "--api-token", "hunter2hunter2", "--lr", "0.1"]
    recorder = RunRecorder(tmp_path, about(command=command), secrets={"hunter2hunter2"}, warn=said.append)
    begun(recorder)
    recorder.failed(FailureSummary(1, "rank 1: bad token hunter2hunter2"))
    recorder.saved(CheckpointSaved(0, 3, 0.5, "s3://user:hunter2hunter2@bucket/run"))
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "hunter2" not in text
    assert json.loads((tmp_path / "run.json").read_text())["command"][-2:] == ["--lr", "0.1"]
    assert said == []


def test_a_later_attempt_leaves_what_the_run_is_as_it_was(tmp_path: Path) -> None:
    begun(RunRecorder(tmp_path, about(command=["first.py"]), warn=print))
    begun(RunRecorder(tmp_path, about(command=["second.py"]), warn=print), attempt=1)
    assert json.loads((tmp_path / "run.json").read_text())["command"] == ["first.py"]
    assert [event["attempt"] for event in read_events(tmp_path)] == [0, 1]


def test_a_record_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    recorder = RunRecorder(tmp_path / "gone", about(), warn=said.append)
    begun(recorder)
    recorder.ended("finished", 0)
    (line,) = said
    assert "cannot be written" in line


def test_only_its_user_may_read_a_record(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        begun(RunRecorder(tmp_path, about(), warn=print))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def place(workdir: Path, given: str | None = None, **other: Any) -> Path:
    """Where a sidecar would put the record, and a record there."""
    said = about(**other)
    folder = folder_of_ranks(given, workdir, "t-1", said)
    assert folder is not None
    RunRecorder(folder, said, warn=print)
    return folder


def test_restarts_of_one_agent_are_one_run_and_those_of_the_next_another(tmp_path: Path) -> None:
    first = place(tmp_path, run_id="127.0.0.1:29500", process={"pid": 5, "started": "7"})
    assert first == tmp_path / "runs" / "t-1"
    assert place(tmp_path, run_id="127.0.0.1:29500", process={"pid": 5, "started": "7"}) == first
    second = place(tmp_path, run_id="127.0.0.1:29500", process={"pid": 6, "started": "9"})
    assert second == tmp_path / "runs" / "t-1-2"


def test_a_slurm_step_that_was_requeued_is_one_run(tmp_path: Path) -> None:
    first = place(tmp_path, launcher="slurm", run_id="47.0", process={"pid": 5})
    assert place(tmp_path, launcher="slurm", run_id="47.0", process={"pid": 99}) == first
    assert place(tmp_path, launcher="slurm", run_id="48.0", process={"pid": 5}) != first


def test_a_variable_names_the_folder_or_says_that_there_is_none(tmp_path: Path) -> None:
    assert place(tmp_path, "kept/here") == tmp_path / "kept" / "here"
    assert place(tmp_path, str(tmp_path / "absolute")) == tmp_path / "absolute"
    assert folder_of_ranks("", tmp_path, "t-1", about()) is None
    assert not (tmp_path / "runs").exists()


def test_a_process_is_known_from_another_of_its_number() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = identity_of(process.pid)
        assert is_alive(identity) is True
        assert is_alive({**identity, "started": "1"}) is False
        process.communicate(b"\n")
    assert is_alive(identity) is False


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"boot": "another"}, {"namespace": "another"}])
def test_of_a_process_of_another_machine_nothing_is_said(elsewhere: dict[str, str]) -> None:
    assert is_alive({**identity_of(os.getpid()), **elsewhere}) is None
    assert is_alive({}) is None
