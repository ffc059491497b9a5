"""The closing report of a run that failed: a pure function to text, made for somebody who was not watching."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path

from allstep.launch.ending import WorkerEnd, describe

# torch.distributed puts this before each line of a traceback once a process group exists.
_TORCHS_PREFIX = re.compile(r"^\[rank\d+\]: ?")

LINES = 50
"""Lines of the failed rank's standard error that the report repeats, at most."""


def failure_report(cause: WorkerEnd, ends: Sequence[WorkerEnd], *, name: str, log: Path | None) -> str:
    """Say which rank failed first, how, and what it last wrote; then what became of the others.

    Args:
        cause: the end that `first_cause` chose.
        ends: the ends of all workers.
        name: the run's name.
        log: the log of the rank that failed, or None where none was written.
    """
    lines = [f"run {name} failed: rank {cause.rank} of {len(ends)} failed first, {describe(cause.returncode)}"]
    if cause.returncode == -signal.SIGKILL:
        lines.append("  SIGKILL came from outside the run; when memory runs short the kernel sends it (see dmesg)")
    if log is not None:
        lines.append(f"  its output: {log}")
    if last := last_lines(cause.stderr):
        lines.append("  its last lines on standard error:")
        lines += [f"    {line}" if line else "" for line in last]
    else:
        lines.append("  it wrote nothing to standard error")
    lines += [f"  {line}" for line in _others(cause, ends)]
    return "\n".join(lines) + "\n"


def last_lines(stderr: str) -> list[str]:
    """Return the end of what was written to standard error: from where its last traceback or crash dump begins."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in stderr.replace("\r\n", "\n").rstrip().split("\n")]
    lines = [_TORCHS_PREFIX.sub("", line) for line in lines[-LINES:]]
    for index, line in enumerate(lines):
        if line.startswith(
            ("Traceback (most recent call last)", "Fatal Python error", "  + Exception Group Traceback")
        ):
            return lines[index:]
    return lines if any(lines) else []


def _others(cause: WorkerEnd, ends: Sequence[WorkerEnd]) -> list[str]:
    alike: dict[str, list[int]] = {}
    for end in sorted(ends, key=lambda end: end.rank):
        if end.rank == cause.rank:
            continue
        if end.killed:
            how = "ended by allstep"
        elif end.returncode == 0:
            how = "finished without error"
        else:
            how = f"failed too, {describe(end.returncode)}"
        alike.setdefault(how, []).append(end.rank)
    return [f"{'rank' if len(ranks) == 1 else 'ranks'} {_spans(ranks)}: {how}" for how, ranks in alike.items()]


def _spans(ranks: Sequence[int]) -> str:
    spans: list[tuple[int, int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1] = (spans[-1][0], rank)
        else:
            spans.append((rank, rank))
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
