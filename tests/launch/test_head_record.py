"""`allstep run` keeps a record of its attempts, its ranks' progress, its saves and its end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allstep.cli.main import main
from allstep.run_record.event_log import read_events
from tests.jobs.launchers import script
from tests.jobs.running import run, started

pytestmark = pytest.mark.slow

# A rank that reports as one of allstep's does, without the time that importing torch takes.
RANK = """
import signal, socket, time
from allstep.monitor.client import Client
from allstep.protocol.heartbeat import RankActivity
from allstep.protocol.messages import CheckpointSaved, RankHello
from allstep.protocol.registration import RankRegistration
stopped = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: stopped.append(1))
attempt, world = int(os.environ["ALLSTEP_ATTEMPT"]), int(os.environ["WORLD_SIZE"])
registration = RankRegistration(rank, world, socket.gethostname(), os.getpid(), "cpu", "gloo")
client = Client.connect(os.environ["ALLSTEP_CHANNEL"], os.environ["ALLSTEP_KEY"], RankHello(attempt, registration), 20)
activity = RankActivity()
with activity.run("Trainer", lambda: 50):
    activity.step_begins(1, 10 * attempt + 5)
    client.start(activity)
    if rank == 0:
        client.tell(CheckpointSaved(0, 10 * attempt + 4, 0.5, "/c/save"))
"""


def record(folder: Path, name: str = "r") -> list[dict[str, Any]]:
    return read_events(folder / "runs" / name)


def kinds(folder: Path) -> list[str]:
    return [event["kind"] for event in record(folder) if event["kind"] not in ("progress", "arrived")]


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (met := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a file that another process writes
    return met


def test_a_run_that_is_restarted_and_finishes_is_told_from_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, RANK + "if attempt == 0 and rank == 1:\n    os.kill(os.getpid(), 9)\nclient.close()")
    job = run(tmp_path, "--name=r", "--nproc=2", "--max-restarts=1", path, "--api-key", "not-to-be-seen")
    assert job.code == 0, job.text
    events = record(tmp_path)
    assert kinds(tmp_path).count("save") in (1, 2)
    assert [kind for kind in kinds(tmp_path) if kind != "save"] == [
        *("attempt", "failure", "attempt_end"),
        *("attempt", "attempt_end", "end"),
    ]
    (failure,) = [event for event in events if event["kind"] == "failure"]
    assert (failure["rank"], failure["attempt"]) == (1, 0)
    assert "SIGKILL" in failure["what"]
    assert [event["outcome"] for event in events if "outcome" in event] == ["failed", "finished", "finished"]
    assert [event for event in events if event["kind"] == "progress"][-1]["iteration"] == 15
    text = "".join(file.read_text() for file in (tmp_path / "runs" / "r").glob("*.json*"))
    assert "not-to-be-seen" not in text
    assert main(["status", "--runs", str(tmp_path / "runs"), "--json", "r"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["state"], status["attempts"], status["iteration"], status["goal"]) == ("finished", 2, 15, 50)
    assert status["checkpoint"]["step"] == 14


WAITS = (
    RANK
    + """
while not stopped:
    time.sleep(0.05)
print("saved", flush=True)
client.close()
sys.exit(85)
"""
)


def test_a_run_that_is_cancelled_saves_and_is_not_restarted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, WAITS)
    with started(tmp_path, "--name=r", "--nproc=2", "--max-restarts=2", path) as running:
        until(lambda: "progress" in [event["kind"] for event in record(tmp_path)])
        assert main(["cancel", "--runs", str(tmp_path / "runs"), "r"]) == 0
        job = running.end()
    assert job.text.count("saved") == 2
    assert job.code == 85
    assert kinds(tmp_path)[-3:] == ["signal", "attempt_end", "end"]
    capsys.readouterr()
    main(["status", "--runs", str(tmp_path / "runs"), "--json", "r"])
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["state"], status["why"]) == ("stopped", "exit code 85")


@pytest.mark.nightly
def test_a_run_that_is_cancelled_at_once_is_gone_at_once(tmp_path: Path) -> None:
    path = script(tmp_path, WAITS.replace("while not stopped", "while True"))
    with started(tmp_path, "--name=r", "--nproc=2", path) as running:
        until(lambda: "progress" in [event["kind"] for event in record(tmp_path)])
        assert main(["cancel", "--now", "--runs", str(tmp_path / "runs"), "r"]) == 0
        assert running.end().code == 143
    assert kinds(tmp_path)[-2:] == ["attempt_end", "end"]


@pytest.mark.nightly
def test_a_supervisor_that_was_killed_is_known_to_be_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, WAITS)
    with started(tmp_path, "--name=r", "--nproc=2", path) as running:
        until(lambda: "progress" in [event["kind"] for event in record(tmp_path)])
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
        main(["status", "--runs", str(tmp_path / "runs"), "--json", "r"])
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["state"], status["iteration"]) == ("killed", 5)


@pytest.mark.nightly
def test_a_run_whose_folder_is_gone_goes_on_and_says_so(tmp_path: Path) -> None:
    path = script(
        tmp_path, RANK + "import shutil\nif rank == 0:\n    shutil.rmtree('runs')\ntime.sleep(8)\nclient.close()"
    )
    job = run(tmp_path, "--name=r", "--nproc=2", path)
    assert job.code == 0
    assert job.text.count("the run's record cannot be written") == 1
