"""What a check finds, and what it is told of the machine that it looks at.

Contract: a check is a function from a `Host` to `HostFinding`s. It changes nothing that outlives it, takes no longer
than `Host.within` where it waits for anything, and raises nothing that a sick machine can cause. Each finding that is
not good has a remedy: what to type, or whom to ask for what. A good one says in a few words what was seen.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from allstep.protocol.foreign_text import one_line

Verdict = Literal["good", "warning", "bad"]
"""Good; a warning, with which training starts and may be slower or end in a way that surprises; bad: it will fail."""


@dataclass(frozen=True, slots=True)
class HostFinding:
    """What a check says of one thing.

    Args:
        subject: what was looked at, such as "torch" or "shared memory".
        verdict: "good", "warning" or "bad".
        text: what was seen, in one line.
        remedy: what to do about it; empty where it is good.
    """

    subject: str
    verdict: Verdict
    text: str
    remedy: str = ""


def no_devices() -> tuple[str, ...]:
    """The devices of a machine without any."""
    return ()


@dataclass(frozen=True, slots=True)
class Host:
    """The machine to look at, and what is to run on it.

    Args:
        environ: what ranks would inherit.
        folder: where runs are to go; need not be there yet.
        workers: ranks on this machine; None is one for each visible device.
        nodes: machines of the run.
        visible: the CUDA devices that ranks could use, as CUDA_VISIBLE_DEVICES would name them.
        within: seconds that a check may wait for something.
        root: the folder in which proc and sys are looked for.
        asked: programs that were started to be asked; who looks at the host ends those that are left.
    """

    environ: Mapping[str, str]
    folder: Path
    workers: int | None = None
    nodes: int = 1
    visible: Callable[[], tuple[str, ...]] = no_devices
    within: float = 8.0
    root: Path = Path("/")
    asked: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False, compare=False)

    def ranks(self) -> int:
        """How many ranks are to run on this machine."""
        return self.workers or len(self.visible()) or 1

    def read(self, path: str) -> str:
        """The text of a file below the root, such as "proc/meminfo"; empty where it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def names(self, path: str) -> list[str]:
        """The names in a folder below the root, sorted; empty where it cannot be read."""
        try:
            return sorted(os.listdir(self.root / path))
        except OSError:
            return []


@dataclass(frozen=True, slots=True)
class CommandAnswer:
    """What a program said; `problem` says in one line why that is of no use, and is empty where it is."""

    out: str = ""
    problem: str = ""


def ask(command: Sequence[str | Path], host: Host, within: float | None = None) -> CommandAnswer:
    """Run a program, bounded in time, with what ranks would inherit; FileNotFoundError where there is none."""
    name = Path(command[0]).name
    limit = host.within if within is None else within
    try:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(host.environ),
        )
    except PermissionError as error:
        return CommandAnswer("", f"{name} cannot be run: {error.strerror}")
    with process:
        host.asked.append(process)
        try:
            answer, complaint = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as expired:
            process.kill()
            return CommandAnswer(_text(expired.stdout), f"{name} did not answer within {limit:g} s")
    out, said = _text(answer), _text(complaint)
    if code := process.returncode:
        words = [line.strip() for line in (said or out).splitlines() if line.strip()]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return CommandAnswer(out, f"{name} ended with {how}" + (f": {one_line(words[-1])}" if words else ""))
    return CommandAnswer(out)


def graded(*, bad: bool) -> Verdict:
    """The verdict on what is not good."""
    return "bad" if bad else "warning"


def in_bytes(count: float) -> str:
    """A number of bytes in words, such as "1.5 GiB"."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 1000 else f"{count / size:.0f} {unit}"
    return f"{count / 1024:.3g} KiB"


def _text(data: bytes | None) -> str:
    return (data or b"").decode(errors="replace")
