"""Runs' folders as they are left behind, made by hand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from allstep.protocol.messages import CheckpointSaved
from allstep.run_record.process_identity import identity_of
from allstep.run_record.progress import Progress
from allstep.run_record.recorder import FailureSummary, RunRecorder, about_run

GONE = {
    "pid": 2**22 - 3,
    "started": "1",
    **{name: identity_of(os.getpid())[name] for name in ("host", "boot", "namespace")},
}
ELSEWHERE = {"pid": 1, "started": "1", "host": "far", "boot": "", "namespace": ""}


class Record:
    """A run in `runs`, as its supervisor would write it; `ago`: seconds since that began."""

    def __init__(self, runs: Path, name: str, *, ago: float = 100.0, process: Any = GONE, job: str = "", **about: Any):
        self.folder = runs / name
        self.folder.mkdir(parents=True)
        self.now = time.time() - ago
        self.process, self.job = process, job
        said = {"name": name, "run_id": name, "launcher": "allstep", "command": ["t.py"], "process": process}
        what = about_run(job=job, **{**said, **about})
        self.recorder = RunRecorder(self.folder, what, warn=print, clock=lambda: self.now)

    def attempt(self, number: int = 0, world: int = 2) -> Record:
        self.recorder.attempt_began(
            number, world=world, nodes=1, launcher="allstep", process=self.process, job=self.job
        )
        self.recorder.arrived(["node7"])
        return self

    def progress(self, iteration: int, *, goal: int = 0, rate: float | None = None) -> Record:
        self.recorder.progress(Progress("Trainer", 2, iteration, 0, goal, "step", 2), rate)
        return self

    def save(self, step: int) -> Record:
        self.recorder.saved(CheckpointSaved(0, step, 0.5, f"/c/save-{step}"))
        return self

    def fail(self, what: str = "rank 1: killed by SIGKILL") -> Record:
        self.recorder.failed(FailureSummary(1, what, report="/r/failure.json"))
        self.recorder.attempt_ended("failed", 137)
        return self

    def end(self, outcome: Any = "finished", code: int = 0, *, attempt: bool = True) -> Record:
        if attempt:
            self.recorder.attempt_ended(outcome, code)
        self.recorder.ended(outcome, code)
        return self


def submitted(runs: Path, name: str, job: str, array: str = "") -> Path:
    """A job that has not begun."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text(json.dumps({"job": job, "array": array}))
    return folder


def programs(folder: Path, **texts: str) -> None:
    """Shell scripts in the place of SLURM's commands; each also notes how it was called, in `asked`."""
    for name, text in texts.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/asked\n{text}\n')
        path.chmod(0o755)


def asked(folder: Path) -> list[str]:
    """How the programs were called."""
    path = folder / "asked"
    return path.read_text().splitlines() if path.exists() else []
