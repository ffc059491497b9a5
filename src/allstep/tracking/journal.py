"""`Journal`: all that a run has told, as lines of JSON in one file, from which every tracker is served.

Contract: one process appends. Records have steps that never fall. A line counts when its end is written, so that one
that a kill cut off is dropped when the file is opened again. `cut` takes away what stands behind a number of records:
the lines go to a file beside, and the cut is noted, so that each tracker learns of it however much later. Reading and
appending may happen in different threads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from allstep.tracking.values import Record, from_line, to_line

FILE = "metrics.jsonl"
_CUTS, _WITHDRAWN = "cuts.json", "withdrawn.jsonl"


class Journal:
    """The lines of one folder.

    Args:
        folder: where they are, or will be.

    Attributes:
        count: records in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        self._lock = Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        # By line, where each ends: what is needed to cut and to read from anywhere.
        self._ends = [0]
        self._steps: list[int] = []
        with self.path.open("rb+") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._steps.append(json.loads(line)["step"])
                self._ends.append(self._ends[-1] + len(line))
            file.truncate(self._ends[-1])
        cuts = folder / _CUTS
        self.cuts: list[int] = json.loads(cuts.read_text()) if cuts.exists() else []

    @property
    def count(self) -> int:
        """Records in it."""
        return len(self._steps)

    @property
    def last_step(self) -> int:
        """The step of the last record; 0 without any."""
        return self._steps[-1] if self._steps else 0

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration; empty without one."""
        first = self.read(0, 1)
        return (first[0].config or {}) if first else {}

    def append(self, records: Sequence[Record]) -> None:
        """Write records behind the others; on return a killed process does not lose them."""
        lines = [(to_line(each) + "\n").encode() for each in records]
        with self._lock, self.path.open("rb+") as file:
            # What a failed write left behind is overwritten.
            file.truncate(self._ends[-1])
            file.seek(self._ends[-1])
            file.write(b"".join(lines))
            file.flush()
            for record, line in zip(records, lines, strict=True):
                self._steps.append(record.step)
                self._ends.append(self._ends[-1] + len(line))

    def read(self, first: int, most: int) -> list[Record]:
        """Up to `most` records from number `first` on."""
        with self._lock, self.path.open("rb") as file:
            last = min(first + most, self.count)
            file.seek(self._ends[min(first, last)])
            text = file.read(self._ends[last] - self._ends[min(first, last)])
        return [from_line(line) for line in text.decode().splitlines()]

    def first_at(self, step: int) -> int:
        """The number of the first record at `step` or later."""
        return next((at for at, each in enumerate(self._steps) if each >= step), self.count)

    def step_of(self, number: int) -> int:
        """The step of a record."""
        return self._steps[number]

    def cut(self, keep: int) -> None:
        """Keep so many records; the others are withdrawn, from here and by every tracker."""
        with self._lock:
            if keep >= self.count:
                return
            with self.path.open("rb+") as file:
                file.seek(self._ends[keep])
                with (self.folder / _WITHDRAWN).open("ab") as aside:
                    aside.write(file.read())
                # The note first: a cut that was noted and not made is only made once more.
                self.cuts.append(keep)
                write_json(self.folder / _CUTS, self.cuts)
                file.truncate(self._ends[keep])
            del self._steps[keep:], self._ends[keep + 1 :]

    def __iter__(self) -> Iterator[Record]:
        at = 0
        while records := self.read(at, 1000):
            yield from records
            at += len(records)


def write_json(path: Path, value: object) -> None:
    """Replace a small file whole, so that a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
