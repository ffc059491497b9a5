"""The starts of a job: each one and how it ended, in `starts.jsonl`, and whether another start would get any further.

Contract: the job's own process adds a line when it begins (`JobRecord.begin`) and one when it ends (`end`). A start
that was killed has no second line. `allstep cancel` adds a line while one runs (`cancel`), and then no other follows.
Progress is the highest step that is saved (`saves.jsonl`): a start that began where the one before began got nowhere.
`another_start` decides from that, purely:
- a job that used up its whole time without a further save ends, since the next would do the same;
- a job that was preempted early may only have had no time: it ends after `MOST_IDLE` such starts in a row.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from allstep.protocol.private_files import append_line, read_lines
from allstep.protocol.save_record import CommittedSave, read_saves

MOST_IDLE = 3


@dataclass(frozen=True, slots=True)
class JobStart:
    """One start of a job.

    Args:
        job: SLURM's number.
        nodes: how many.
        saved: the step that was saved when it began; -1 for none.
        time: when it began, in seconds since 1970.
    """

    job: str
    nodes: int
    saved: int
    time: float


class JobRecord:
    """The record in a job's folder."""

    def __init__(self, folder: Path) -> None:
        self._starts = folder / "starts.jsonl"
        self._saves = folder / "saves.jsonl"

    def saves(self) -> tuple[CommittedSave, ...]:
        """Every save so far, of all starts."""
        return read_saves(self._saves)

    def saved(self) -> int:
        """The highest step that is saved, or -1."""
        return max((each.step for each in self.saves()), default=-1)

    def starts(self) -> list[JobStart]:
        """Every start so far."""
        found = []
        for each in read_lines(self._starts):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if "nodes" in each:
                    found.append(JobStart(str(each["job"]), int(each["nodes"]), int(each["saved"]), each["time"]))
        return found

    def begin(self, job: str, nodes: int) -> JobStart:
        """Note that the job begins; raises OSError."""
        start = JobStart(job, nodes, self.saved(), round(time.time(), 3))
        append_line(self._starts, asdict(start))
        return start

    def end(self, job: str, code: int, what: str) -> None:
        """Note how it ends: the step's exit code, and what becomes of the job; raises OSError."""
        said = {"ended": job, "code": code, "saved": self.saved(), "time": round(time.time(), 3), "what": what}
        append_line(self._starts, said)

    def cancel(self) -> None:
        """Note that a person does not want the present start to be followed by another; raises OSError."""
        append_line(self._starts, {"cancelled": True, "time": round(time.time(), 3)})

    @property
    def is_cancelled(self) -> bool:
        """Whether the present start is not to be followed by another."""
        for each in reversed(read_lines(self._starts)):
            if "cancelled" in each or "nodes" in each:
                return "cancelled" in each
        return False


def another_start(starts: Sequence[JobStart], saved: int, *, used_up: bool) -> str | None:
    """Why a job is not to be started again; None where it is.

    Args:
        starts: all so far, the present one last.
        saved: the step that is saved now, or -1.
        used_up: the job had all of its time.
    """
    idle = 0
    for start in reversed(starts):
        if start.saved != saved:
            break
        idle += 1
    where = "nothing is saved" if saved < 0 else f"step {saved} is the last that is saved, as it was when it began"
    if idle and used_up:
        return f"the job used up its time and got no further: {where}"
    if idle >= MOST_IDLE:
        return f"{idle} starts in a row got no further: {where}"
    return None
