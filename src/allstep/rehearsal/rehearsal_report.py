"""What came of a rehearsal, for a person and for a program. Standard library only.

Contract: `RehearsalReport` is a value; `str` gives lines for a terminal, `as_dict` what JSON takes. `verdict` says:

| verdict | meaning |
| --- | --- |
| exact | the run went on from where it was saved, and every tensor has the unbroken run's bits |
| close | it went on at another number of ranks, and is as near to the unbroken run as one with that number |
| differs | it went on, and what it saved last is not what the unbroken run saved |
| began anew | it did not go on from what it had saved, or had saved nothing |
| failed | it did not come to its end |
| finished early | the script was done before it could be interrupted |
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from allstep.errors import printable
from allstep.rehearsal.interruption import Kind
from allstep.rehearsal.iteration_trace import Parting

Verdict = Literal["exact", "close", "differs", "began anew", "failed", "finished early"]

_MOST_TENSORS = 5
_MOST_LINES = 12


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that is not the same.

    Args:
        name: in the checkpoint.
        what: "values", or what else differs.
        largest: the largest difference of two values.
        relative: the same as a part of the largest value.
    """

    name: str
    what: str
    largest: float | None = None
    relative: float | None = None


@dataclass(slots=True)
class Comparison:
    """Two checkpoints, or several pairs of them.

    Attributes:
        steps: the iterations after which they were taken.
        objects: what is saved in the unbroken run's.
        other_objects: what is saved in the other one.
        tensors: how many were compared.
        numbers: in all of them.
        differences: what is not the same.
    """

    steps: tuple[int, int] = (0, 0)
    objects: tuple[str, ...] = ()
    other_objects: tuple[str, ...] = ()
    tensors: int = 0
    numbers: int = 0
    differences: list[TensorDifference] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether all tensors have the same bits, after the same iteration."""
        return not self.differences and self.steps[0] == self.steps[1] and self.tensors > 0

    @property
    def relative(self) -> float:
        """The largest relative difference; infinity where something else than values differs."""
        if self.steps[0] != self.steps[1]:
            return math.inf
        found = [math.inf if each.relative is None else each.relative for each in self.differences]
        return max(found, default=0.0)

    def add(self, other: Comparison, prefix: str) -> None:
        """Take in another comparison, with something before each name."""
        # Steps that differ are kept: they are what is to be seen.
        if self.steps[0] == self.steps[1]:
            self.steps = other.steps
        self.objects += other.objects
        self.other_objects += other.other_objects
        self.tensors += other.tensors
        self.numbers += other.numbers
        self.differences += [
            TensorDifference(prefix + each.name, each.what, each.largest, each.relative) for each in other.differences
        ]


@dataclass(frozen=True, slots=True)
class StartSummary:
    """One start of the interrupted run.

    Args:
        ranks: how many there were.
        began_at: iterations that were done before its first; None where no engine ran.
        reached: the last iteration that it completed.
        saved: the last iteration that was saved when it ended; None for nothing.
        code: its exit code.
        said: how it ended, in words.
    """

    ranks: int
    began_at: int | None
    reached: int
    saved: int | None
    code: int
    said: str


@dataclass(frozen=True, slots=True)
class RehearsalReport:
    """What came of a rehearsal.

    Args:
        kind: what was rehearsed.
        script: as it was given.
        verdict: see above.
        starts: of the interrupted run.
        iterations: after which it is compared.
        comparison: with the unbroken run; None where there was nothing to compare.
        parting: the first iteration in which the runs differ, where that was seen.
        causes: why, as far as can be told, each with what to do.
        notes: what else is worth knowing.
        output: the end of what a start said that failed.
        folder: where everything is; None where it was removed.
    """

    kind: Kind
    script: str
    verdict: Verdict
    starts: tuple[StartSummary, ...]
    iterations: int
    comparison: Comparison | None = None
    parting: Parting | None = None
    causes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    output: str = ""
    folder: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether a job of this script would go on as if nothing had happened."""
        return self.verdict in ("exact", "close")

    def as_dict(self) -> dict[str, Any]:
        """What `json.dumps` takes; what is no finite number is a text."""
        found: dict[str, Any] = _plain(asdict(self))
        return found

    def __str__(self) -> str:
        lines = [f"rehearsal of {self.kind}: {self.script}"]
        for number, start in enumerate(self.starts):
            ranks = f"{start.ranks} rank{'' if start.ranks == 1 else 's'}"
            saved = "nothing saved" if start.saved is None else f"saved at {start.saved}"
            began = "no engine ran" if start.began_at is None else f"iterations {start.began_at + 1} to {start.reached}"
            if start.began_at is not None and start.reached <= start.began_at:
                began = "no iteration"
            lines.append(f"  start {number}, {ranks}: {began}, {saved}; {start.said} (exit code {start.code})")
        lines += [f"  note: {each}" for each in self.notes]
        lines.append(self._outcome())
        if self.comparison is not None:
            lines += [f"  {_in_words(each)}" for each in self.comparison.differences[:_MOST_TENSORS]]
            if (more := len(self.comparison.differences) - _MOST_TENSORS) > 0:
                lines.append(f"  and {more} more")
        if self.parting is not None:
            lines.append(f"  first seen after iteration {self.parting.iteration}, in: {', '.join(self.parting.parts)}")
        lines += [f"because: {each}" for each in self.causes]
        if self.output:
            lines += ["the start that failed said last:", *(f"  | {each}" for each in self._last_lines())]
        if self.folder is not None:
            lines.append(f"logs, traces and checkpoints: {self.folder}")
        return "\n".join(printable(each) for each in lines)

    def _outcome(self) -> str:
        comparison = self.comparison
        match self.verdict:
            case "exact":
                assert comparison is not None
                return (
                    f"exact: after iteration {self.iterations} all {comparison.tensors} tensors "
                    f"({comparison.numbers:,} numbers) have the bits of the unbroken run's"
                )
            case "close":
                assert comparison is not None
                return (
                    f"close: after iteration {self.iterations} the largest relative difference is "
                    f"{comparison.relative:.1e}, as between unbroken runs at the two sizes"
                )
            case "differs":
                if comparison is None:
                    return "differs: one of the runs has no checkpoint to compare"
                if comparison.steps[0] != comparison.steps[1]:
                    one, two = comparison.steps
                    return (
                        f"differs: the unbroken run saved last after iteration {one}, the interrupted one after {two}"
                    )
                return (
                    f"differs: after iteration {self.iterations} {len(comparison.differences)} of "
                    f"{comparison.tensors} tensors are not the unbroken run's"
                )
            case "began anew":
                return "began anew: the run did not go on from where it was interrupted"
            case "failed":
                return "failed: the run did not come to its end"
            case "finished early":
                return "finished early: the script was done before the interruption held; let it train for longer"

    def _last_lines(self) -> list[str]:
        return self.output.rstrip().splitlines()[-_MOST_LINES:]


def _in_words(each: TensorDifference) -> str:
    if each.largest is None or each.relative is None:
        return f"{each.name}: {each.what}"
    return f"{each.name}: largest difference {each.largest:.1e}, relative {each.relative:.1e}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
