"""Which folder a run's record is in.

Contract: under `allstep run` the record is in the run's folder, RUNS/NAME, beside its logs. A run that another launcher
started has none, so `folder_of_ranks` makes one: the one that the variable `FOLDER` names, else `runs/NAME` in the
folder in which rank 0 works, with a NAME of the script and the time. What belongs together is in one folder: restarts
and Worlds of one launch of torchrun, which one process started, and the starts of a SLURM step that was requeued, which
has the same numbers each time.

What can go wrong: the folder cannot be made, which is an OSError.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allstep.protocol.private_files import read_json
from allstep.run_record.recorder import FILE

FOLDER = "ALLSTEP_RUN_FOLDER"
"""Names the folder for the record of a run without `allstep run`; set and empty: none is kept."""

PRIVATE = 0o700
"""The mode of folders that are made."""

MOST_LOOKED_AT = 200
"""Runs of a folder among which the earlier starts of one are looked for, the newest first."""


def default_name(target: str, stamp: str) -> str:
    """Return a run's name made of what it runs (a script's path or a module's name) and a time stamp."""
    last = target.rstrip("/").split("/")[-1].removesuffix(".py").removesuffix(".__main__")
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', last).strip('-') or 'run'}-{stamp}"


def make_free(runs: Path, name: str) -> str:
    """Make a new folder for a run, and return its name: the one that is given, or with a number behind it."""
    free, number = name, 1
    while True:  # making the folder is the only test that no other launch can come between
        try:
            (runs / free).mkdir(mode=PRIVATE)
        except FileExistsError:
            number += 1
            free = f"{name}-{number}"
        else:
            return free


def folder_of_ranks(given: str | None, workdir: Path, name: str, about: Mapping[str, Any]) -> Path | None:
    """The folder for the record of a run without `allstep run`, made where it is not there; None for no record.

    Args:
        given: the variable `FOLDER`; None where it is not set.
        workdir: where rank 0 works, absolute.
        name: for a new one.
        about: what `run.json` is going to say; its `launcher`, `id` and `process` tell which run this is.

    Raises:
        OSError: it cannot be made.
    """
    if given is not None:
        if not given:
            return None
        folder = workdir / given
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        return folder
    runs = workdir / "runs"
    for folder in newest_runs(runs)[:MOST_LOOKED_AT]:
        if _is_same_run(read_json(folder / FILE), about):
            return folder
    runs.mkdir(parents=True, exist_ok=True)
    return runs / make_free(runs, name)


def newest_runs(runs: Path) -> list[Path]:
    """The folders in `runs` that hold a record, the one that was begun last first."""
    found = []
    with contextlib.suppress(OSError):
        for folder in runs.iterdir():
            with contextlib.suppress(OSError):
                found.append(((folder / FILE).stat().st_mtime, folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _is_same_run(known: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    if (known.get("launcher"), known.get("id")) != (about.get("launcher"), about.get("id")):
        return False
    # SLURM gives a number to one job; what torchrun calls a run may be the same port as yesterday.
    return about.get("launcher") == "slurm" or known.get("process") == about.get("process")
