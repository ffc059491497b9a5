"""What came of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Stream = Literal["out", "err"]


class Line(NamedTuple):
    """A line of output as it was written, its end included, and when it came, on `time.monotonic`."""

    at: float
    stream: Stream
    text: str


@dataclass(frozen=True)
class Job:
    """A job that has ended.

    `code` is its exit code as subprocess gives it. `began` and `ended` are when its own process did, on the clock of
    `said`. `left` are processes of it that were still there a moment later.
    """

    code: int
    said: Sequence[Line]
    began: float
    ended: float
    left: Sequence[str]
    folder: Path
    pid: int

    @property
    def out(self) -> str:
        """Standard output."""
        return "".join(line.text for line in self.said if line.stream == "out")

    @property
    def err(self) -> str:
        """Standard error."""
        return "".join(line.text for line in self.said if line.stream == "err")

    @property
    def lines(self) -> list[str]:
        """All that was said, in the order in which it came."""
        return [line.text.rstrip("\n") for line in self.said]

    @property
    def text(self) -> str:
        """The same as one text."""
        return "\n".join(self.lines)

    @property
    def block(self) -> list[str]:
        """The lines of the report on the terminal, from its headline on; there is one report, whoever printed it."""
        lines = self.lines
        starts = [n for n, line in enumerate(lines) if line.startswith("allstep: ") and " failed: " in line]
        starts = [n for n in starts if not lines[n].startswith("allstep: attempt ")]
        assert len(starts) == 1, f"{len(starts)} reports in:\n{self.text}"
        return lines[starts[0] :]

    @property
    def report(self) -> Mapping[str, Any]:
        """The failure.json of the last attempt; {} where there is none."""
        attempts = sorted(self.folder.glob("runs/*/attempt_*"), key=lambda path: int(path.name.split("_")[1]))
        if not attempts or not (attempts[-1] / "failure.json").exists():
            return {}
        content: Mapping[str, Any] = json.loads((attempts[-1] / "failure.json").read_text())
        return content

    @property
    def cause(self) -> Mapping[str, Any]:
        """The first cause as failure.json has it."""
        report = self.report
        assert report, f"there is no failure.json; the job said:\n{self.text}"
        found: Mapping[str, Any] = report["cause"]
        return found

    def since(self, words: str) -> float:
        """Seconds from the first line with these words to the job's end."""
        at = next((line.at for line in self.said if words in line.text), None)
        assert at is not None, f"{words!r} was not said in:\n{self.text}"
        return self.ended - at
