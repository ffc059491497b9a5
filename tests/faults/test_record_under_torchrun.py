"""The record of a run that torchrun started: restarts, a cancellation with a save, and one without."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allstep.cli.main import main
from tests.jobs.launchers import command
from tests.jobs.running import Running, start

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

TRAIN = """
import sys, time
import torch
import allstep
from allstep import Checkpoint, Engine, Preemption

with allstep.init() as world:
    model = world.wrap(torch.nn.Linear(2, 1))
    def step(engine, batch):
        model(torch.ones(1, 2)).sum().backward()
        time.sleep(0.05)
        if engine.state.iteration == int(sys.argv[1]) and world.rank == 1:
            raise ValueError("bad batch")
    trainer = Engine(step)
    Checkpoint("checkpoints", {"model": model}, every=5).attach(trainer).resume()
    Preemption().attach(trainer)
    trainer.run(range(400), max_epochs=1, window=1)
"""


def under_torchrun(folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> Any:
    path = folder / "train.py"
    path.write_text(TRAIN)
    return start(folder, command("torchrun", path, arguments, options=options))


def status(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", "--runs", str(folder / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return dict(found[0]) if found else {}


def until(holds: Callable[[], Any], running: Running) -> None:
    deadline = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < deadline
        assert running.process.poll() is None or holds()
        time.sleep(0.1)  # a file that another process writes


def name(folder: Path) -> str:
    (run,) = (folder / "runs").iterdir()
    return run.name


def test_it_is_cancelled_with_a_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with under_torchrun(tmp_path, "-1") as running:
        until(lambda: (status(tmp_path, capsys).get("iteration") or 0) > 6, running)
        seen = status(tmp_path, capsys)
        assert (seen["state"], seen["launcher"], seen["world"], seen["goal"]) == ("running", "torchrun", 2, 400)
        assert main(["cancel", "--runs", str(tmp_path / "runs"), name(tmp_path)]) == 0
        running.end()
    ended = status(tmp_path, capsys)
    assert ended["state"] == "preempted"
    assert ended["checkpoint"]["step"] == ended["iteration"]


def test_it_is_cancelled_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with under_torchrun(tmp_path, "-1", options=("--max-restarts=3",)) as running:
        until(lambda: (status(tmp_path, capsys).get("iteration") or 0) > 3, running)
        assert main(["cancel", "--now", "--runs", str(tmp_path / "runs"), name(tmp_path)]) == 0
        running.end()
    assert status(tmp_path, capsys)["attempts"] == 1


def test_restarts_are_attempts_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with under_torchrun(tmp_path, "12", options=("--max-restarts=1",)) as running:
        assert running.end().code != 0
    ended = status(tmp_path, capsys)
    assert (ended["run"], ended["state"], ended["attempts"]) == (name(tmp_path), "failed", 2)
    assert "ValueError" in ended["failure"]["what"]
