"""A run's folder: `RUNS/NAME/attempt_K/rank_R.log`, and `failure.json` beside the logs of an attempt that failed.

Contract: `create_attempt` makes the folder of a new attempt and never touches an older one: a name that has been used
before gets the next attempt, so a requeued job loses no log. A run whose name was made up gets one that is free.
`join_attempt` is for a machine that is told name and attempt; the folder may be there already, on a shared disk.
Folders that are made are their user's alone: logs and reports may hold what a script was given in confidence. One that
is there already is used as it is.
What can go wrong: the folder cannot be made, which is an OSError for the caller to weigh.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from allstep.run_record.run_folders import PRIVATE, make_free

_ATTEMPT = re.compile(r"attempt_([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """The folder of one start of all workers."""

    path: Path
    name: str
    attempt: int

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log."""
        return self.path / f"rank_{rank}.log"

    @property
    def failure(self) -> Path:
        """The path of the report as JSON."""
        return self.path / "failure.json"


def create_attempt(runs: Path, name: str, *, named: bool) -> AttemptFolder:
    """Make the folder of a new attempt.

    Args:
        runs: the folder that holds run folders; made if it is not there.
        name: the run's name.
        named: a person chose the name, so an existing folder is that run's; otherwise a free name is taken.

    Raises:
        OSError: a folder could not be made or written.
    """
    runs.mkdir(parents=True, exist_ok=True)
    if not named:
        name = make_free(runs, name)
    folder = runs / name
    folder.mkdir(mode=PRIVATE, exist_ok=True)
    # One more than the highest, not how many there are: an older attempt may have been deleted.
    attempt = 1 + max(
        (int(found[1]) for each in folder.iterdir() if (found := _ATTEMPT.fullmatch(each.name))), default=-1
    )
    while True:
        path = folder / f"attempt_{attempt}"
        try:
            path.mkdir(mode=PRIVATE)
        except FileExistsError:  # another launch of the same name was quicker
            attempt += 1
        else:
            return AttemptFolder(path, name, attempt)


def join_attempt(runs: Path, name: str, attempt: int) -> AttemptFolder:
    """Make the folder of an attempt that another machine began, or use it where it is there.

    Raises:
        OSError: the folder could not be made.
    """
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / name / f"attempt_{attempt}"
    for each in (path.parent, path):
        each.mkdir(mode=PRIVATE, exist_ok=True)
    return AttemptFolder(path, name, attempt)
