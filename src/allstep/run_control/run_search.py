"""Which runs there are in a folder, and which of them a person means.

Contract: a run's folder is one with a record (`run.json`), or with `submission.json`, of a job that has not begun.
`all_runs` gives those of a folder, the one that began last at the end. `find_runs` takes a name, a path, or the number
of a SLURM job, and gives one run, or all members of an array.

What can go wrong: there is no such run, which is a RunControlError that says where was looked and what there is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allstep.errors import RunControlError
from allstep.protocol.private_files import read_json
from allstep.run_record.recorder import FILE
from allstep.run_record.run_history import RunHistory, read_history
from allstep.suggestions import did_you_mean

SUBMISSION = "submission.json"

_JOB = re.compile(r"[0-9]{1,10}(_[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run's folder, and what it says.

    Attributes:
        folder: absolute.
        history: what its record says.
        submission: what `allstep submit` wrote; empty for a run that it did not submit.
    """

    folder: Path
    history: RunHistory
    submission: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the run."""
        return self.folder.name

    @property
    def array(self) -> str:
        """The number of the array whose members' folders lie beside; empty for a run."""
        return str(self.submission.get("job", "")) if self.submission.get("array") else ""

    @property
    def job(self) -> str:
        """The SLURM job that has it; empty outside SLURM, and for an array."""
        return self.history.job or ("" if self.array else str(self.submission.get("job", "")))

    @property
    def is_submitted(self) -> bool:
        """Whether its job is one of `allstep submit`, whose own process stops and requeues it."""
        return (self.folder / "starts.jsonl").exists() or bool(self.submission)


def all_runs(runs: Path) -> list[FoundRun]:
    """The runs in a folder, the one that began last at the end; none where there is no such folder."""
    found = []
    with contextlib.suppress(OSError):
        for folder in runs.absolute().iterdir():
            with contextlib.suppress(OSError):
                if (run := read_run(folder)) is not None:
                    found.append((_began(run), run.name, run))
    return [run for _, _, run in sorted(found, key=lambda each: each[:2])]


def read_run(folder: Path) -> FoundRun | None:
    """The run in a folder; None where it holds none."""
    if not (folder / FILE).exists() and not (folder / SUBMISSION).exists():
        return None
    return FoundRun(folder.absolute(), read_history(folder), read_json(folder / SUBMISSION))


def find_runs(runs: Path, meant: str) -> list[FoundRun]:
    """The runs that a person means; one, but for an array's number or name.

    Args:
        runs: the folder that holds run folders.
        meant: a run's name in it, the path of a run's folder, or a SLURM job's number.

    Raises:
        RunControlError: there is none.
    """
    for folder in (runs / meant, Path(meant)):
        if (run := read_run(folder)) is not None:
            return [run, *_members(run)] if run.array else [run]
    there = all_runs(runs)
    if _JOB.fullmatch(meant):
        # Each job of a chain has its own number, so earlier attempts count too.
        found = [run for run in there if meant in _jobs(run) | {job.partition("_")[0] for job in _jobs(run)}]
        if found:
            return found
        raise RunControlError(f"no run in {runs} is of job {meant}; say with --runs where its folder is")
    names = [run.name for run in there]
    hint = did_you_mean(meant, names) or (f"; the last one there is {names[-1]}" if names else ", which holds no run")
    raise RunControlError(f"there is no run {meant} in {runs}{hint}; for runs elsewhere say --runs DIR")


def _jobs(run: FoundRun) -> set[str]:
    jobs = {attempt.job for attempt in run.history.attempts} | {run.job, run.array}
    return jobs - {""}


def _members(array: FoundRun) -> list[FoundRun]:
    """The runs of an array's members that have begun."""
    pattern = re.compile(re.escape(array.name) + r"-[0-9]+")
    return [run for run in all_runs(array.folder.parent) if pattern.fullmatch(run.name)]


def _began(run: FoundRun) -> float:
    """When it began, or was submitted."""
    if run.history.about.get("created"):
        return float(run.history.about["created"])
    return (run.folder / SUBMISSION).stat().st_mtime
