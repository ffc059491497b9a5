"""What a job's checkpoints say to whoever starts and requeues the job: how far it is saved, and how long a save takes.

Contract: the environment variable `SAVES` names a file. Rank 0 adds a line of JSON to it for each checkpoint that was
committed (`note_save`); whoever set the variable reads it (`read_saves`). A line that cannot be read, such as one that
a full disk cut, is left out. With `MEASURE` set besides, a run saves once after its first iteration, so that the time
of a save is known before it matters. A job without these variables pays nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from allstep.protocol.private_files import append_line, read_lines

SAVES = "ALLSTEP_SAVES"
"""Names the file."""

MEASURE = "ALLSTEP_MEASURE_SAVE"
"""Set to 1 where the time of a save is not known yet."""


@dataclass(frozen=True, slots=True)
class CommittedSave:
    """One committed checkpoint.

    Args:
        step: the iteration after which it was taken.
        seconds: how long it took from its beginning until it was committed.
        time: when that was, in seconds since 1970.
        run: tells the saves of one process from those of the next.
    """

    step: int
    seconds: float
    time: float
    run: int


def note_save(step: int, seconds: float, environ: Mapping[str, str]) -> None:
    """Add a committed checkpoint to the record, where there is one; raises OSError."""
    path = environ.get(SAVES)
    if not path:
        return
    save = CommittedSave(step, round(seconds, 3), round(time.time(), 3), os.getpid())
    append_line(path, asdict(save), sync=True)


def read_saves(path: Path) -> tuple[CommittedSave, ...]:
    """The saves in a record, oldest first; none where it is not there or cannot be read."""
    saves = []
    for found in read_lines(path):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            saves.append(
                CommittedSave(int(found["step"]), float(found["seconds"]), float(found["time"]), int(found["run"]))
            )
    return tuple(saves)
