"""What a run's ranks printed, across its attempts and requeues, and what they go on to print.

Contract: `RunLogs.read` gives whatever has been added since it was last called, as `(label, lines)` in the order of
attempts and, in each, of ranks. A line counts when its end is written; `rest` gives what stands without one. Under
`allstep run` each attempt has a file for each rank. Where another launcher keeps the output there are none, and the log
of a SLURM job is read instead, if that is in the run's folder: it has all ranks in one.

What can go wrong: nothing is kept there, which is a RunControlError that says where the output is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from allstep.errors import RunControlError
from allstep.run_control.run_search import FoundRun

_ATTEMPT = re.compile(r"attempt_([0-9]{1,9})")
_RANK = re.compile(r"rank_([0-9]{1,9})\.log")
_JOB = re.compile(r"slurm-(.+)\.log")

_AT_ONCE = 1 << 20


@dataclass(slots=True)
class LogFile:
    """One file, and how far it was read.

    Attributes:
        path: where it is.
        attempt: of which it is; -1 for the log of a job.
        rank: whose it is; -1 for the log of a job.
        label: names it to a person.
    """

    path: Path
    attempt: int
    rank: int
    label: str
    _at: int = 0
    _unfinished: bytes = b""

    def read(self, most: int | None = None) -> list[str]:
        """The lines that were added; of what is there at first, the last `most`."""
        lines: list[bytes] = []
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._at:  # it was cut: begin anew
                    self._at, self._unfinished = 0, b""
                file.seek(self._at)
                while data := file.read(_AT_ONCE):
                    self._at += len(data)
                    *whole, self._unfinished = (self._unfinished + data).split(b"\n")
                    lines += whole
                    if most is not None:
                        del lines[: max(0, len(lines) - most)]
        except FileNotFoundError:
            pass
        return [line.decode(errors="replace") for line in lines]

    def rest(self) -> list[str]:
        """What stands without an end."""
        rest, self._unfinished = self._unfinished, b""
        return [rest.decode(errors="replace")] if rest else []


@dataclass(slots=True)
class RunLogs:
    """The logs of a run.

    Args:
        folder: the run's.
        rank: whose output; None for that of all.
        job: the log of the SLURM job rather than the ranks'.
    """

    folder: Path
    rank: int | None = None
    job: bool = False
    _files: dict[Path, LogFile] = field(default_factory=dict)

    def read(self, most: int | None = None) -> Iterator[tuple[LogFile, list[str]]]:
        """What was added, file by file.

        Args:
            most: lines of each file that is read for the first time, from its end; None for all.
        """
        for file in self._look():
            is_new = file.path not in self._files
            file = self._files.setdefault(file.path, file)
            if lines := file.read(most if is_new else None):
                yield file, lines

    def rest(self) -> Iterator[tuple[LogFile, list[str]]]:
        """What stands without the end of a line, once nothing more comes."""
        for file in self._files.values():
            if lines := file.rest():
                yield file, lines

    def check(self, run: FoundRun, *, will_come: bool) -> None:
        """Raise RunControlError where there is nothing to show.

        Args:
            run: the same run.
            will_come: it goes on, so that there may be something later.
        """
        if self._look():
            return
        ranks = RunLogs(self.folder)._look()
        if self.rank is not None and ranks and ranks[0].rank >= 0 and not will_come:
            known = sorted({file.rank for file in ranks})
            raise RunControlError(f"run {run.name} has no log of rank {self.rank}; it has those of ranks {known}")
        launcher = run.history.about.get("launcher", "allstep")
        if launcher == "allstep" and will_come:
            return
        if self.rank is not None and ranks:
            raise RunControlError(
                f"run {run.name} keeps the output of all ranks in one log, {ranks[-1].path}; leave out --rank"
            )
        raise RunControlError(f"run {run.name} keeps no output in {self.folder}: {_elsewhere(str(launcher))}")

    def _look(self) -> list[LogFile]:
        """The files that there are now, in order."""
        found = [] if self.job else list(self._rank_logs())
        if not found and (self.job or self.rank is None or not any(self.folder.glob("attempt_*"))):
            found = self._job_logs() if self.rank is None else []
        return found

    def _rank_logs(self) -> Iterator[LogFile]:
        attempts = [(int(named[1]), each) for each in _within(self.folder) if (named := _ATTEMPT.fullmatch(each.name))]
        for attempt, folder in sorted(attempts):
            ranks = [(int(named[1]), each) for each in _within(folder) if (named := _RANK.fullmatch(each.name))]
            for rank, path in sorted(ranks):
                if self.rank is None or self.rank == rank:
                    yield LogFile(path, attempt, rank, f"attempt {attempt}, rank {rank}")

    def _job_logs(self) -> list[LogFile]:
        logs = [each for each in _within(self.folder) if _JOB.fullmatch(each.name)]
        return [LogFile(each, -1, -1, each.name) for each in sorted(logs, key=lambda path: path.stat().st_mtime)]


def _within(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _elsewhere(launcher: str) -> str:
    match launcher:
        case "allstep":
            return "no rank has written anything"
        case "torchrun":
            return "torchrun has it, in the folder that its --log-dir named, or on its terminal"
        case "slurm":
            return "srun has it, in the file that the batch script's --output named, or on its terminal"
    return "the launcher has it"
