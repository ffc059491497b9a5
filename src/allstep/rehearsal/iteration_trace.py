"""What each start of a rehearsed script noted, and where two runs part. Written by ranks, read by the rehearsal.

Contract: a `StartOrder` says what a start is to do, and travels in the command line. Each rank adds lines of JSON to a
file of its own, `trace_file(folder, start, rank)`, whose numbers are those of the starts of one `allstep run` folder.
`read_traces` gives them back; a line that was cut by a kill is left out. The meeting: rank 0, after the iteration
`meet_at`, makes the file `REACHED` and waits until there is a file `GO`. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REACHED = "reached"
GO = "go"
SAMPLES = "samples"
GENERATORS = "generators"
"""Digests that each rank has for itself."""


@dataclass(frozen=True, slots=True)
class StartOrder:
    """What one start of a script is to do.

    Args:
        folder: of the run: for traces, checkpoints and the meeting.
        last: the iteration after which the script ends; None for its own end.
        meet_at: the iteration after which rank 0 waits; None for nowhere.
    """

    folder: str
    last: int | None = None
    meet_at: int | None = None

    def to_text(self) -> str:
        """The order as `parse` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> StartOrder:
        """Read an order."""
        return StartOrder(**json.loads(text))


def trace_file(folder: Path, start: int, rank: int) -> Path:
    """Where a rank writes in a start."""
    return folder / "traces" / f"start_{start}_rank_{rank}.jsonl"


@dataclass(slots=True)
class RankTrace:
    """What one rank noted in one start.

    Attributes:
        pid: of its process.
        places: addresses that the script saves to.
        begins_at: the iteration where its run began; None where none did.
        at_begin: digests by part then.
        iterations: digests by part after each iteration.
        ended_at: the iteration at which the run ended; None where it was cut.
        is_complete: whether that was the script's own end.
    """

    pid: int = 0
    places: list[str] = field(default_factory=list)
    begins_at: int | None = None
    at_begin: dict[str, str] = field(default_factory=dict)
    iterations: dict[int, dict[str, str]] = field(default_factory=dict)
    ended_at: int | None = None
    is_complete: bool = False

    def take(self, line: Mapping[str, Any]) -> None:
        """Add what a line says."""
        if "pid" in line:
            self.pid = int(line["pid"])
        elif "place" in line:
            self.places.append(str(line["place"]))
        elif "begins_at" in line:
            self.begins_at, self.at_begin, self.ended_at = int(line["begins_at"]), line["parts"], None
        elif "iteration" in line:
            self.iterations[int(line["iteration"])] = line["parts"]
        elif "ended_at" in line:
            self.ended_at, self.is_complete = int(line["ended_at"]), bool(line["complete"])


@dataclass(slots=True)
class RunTrace:
    """What all ranks noted in one start, in rank order."""

    ranks: list[RankTrace] = field(default_factory=list)

    @property
    def main(self) -> RankTrace:
        """Rank 0's."""
        return self.ranks[0] if self.ranks else RankTrace()

    @property
    def went_on_at(self) -> int | None:
        """Iterations that were done before the first of this start; None where none was run."""
        first = min(self.main.iterations, default=None)
        return self.main.begins_at if first is None else first - 1

    @property
    def reached(self) -> int:
        """The highest iteration that was completed."""
        return max((at for each in self.ranks for at in each.iterations), default=0)

    def parts(self, iteration: int, *, other_size: bool = False) -> dict[str, str]:
        """Digests of all ranks after an iteration, by part.

        Args:
            iteration: which; an empty answer where some rank did not note it.
            other_size: leave out what is not to be the same at another number of ranks.
        """
        lines = [each.iterations.get(iteration) for each in self.ranks]
        known = [each for each in lines if each is not None]
        if not known or len(known) < len(lines):
            return {}
        # Samples are summed, so that it does not matter which rank has which.
        found = {SAMPLES: _sum(each.get(SAMPLES, "0") for each in known)}
        if not other_size:
            found |= {part: value for part, value in known[0].items() if part not in (SAMPLES, GENERATORS)}
            found[GENERATORS] = " ".join(each.get(GENERATORS, "") for each in known)
        return found


def read_traces(folder: Path, start: int) -> RunTrace:
    """What the ranks of a start noted."""
    ranks: list[RankTrace] = []
    while (path := trace_file(folder, start, len(ranks))).exists():
        trace = RankTrace()
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                trace.take(json.loads(line))
        ranks.append(trace)
    return RunTrace(ranks)


@dataclass(frozen=True, slots=True)
class Parting:
    """The first iteration in which two runs differ, and in which parts."""

    iteration: int
    parts: tuple[str, ...]


def first_parting(one: RunTrace, other: RunTrace, *, other_size: bool = False) -> Parting | None:
    """Where two runs part, as far as both noted the same iterations."""
    for iteration in sorted(one.main.iterations.keys() & other.main.iterations.keys()):
        mine, theirs = (each.parts(iteration, other_size=other_size) for each in (one, other))
        if not mine or not theirs:  # a rank was killed before it noted this one
            continue
        differ = sorted(part for part in mine.keys() | theirs.keys() if mine.get(part) != theirs.get(part))
        if differ:
            return Parting(iteration, tuple(differ))
    return None


def _sum(digests: Iterable[str]) -> str:
    return f"{sum(int(each, 16) for each in digests) % (1 << 64):x}"
