"""Evidence that a worker ended because memory ran out.

Contract: an attempt makes a `MemoryWatch` before its workers start. `note` then says, for a worker that ended, whether
memory is the likely reason, or "". There are two kinds of evidence:
- the kernel's own count of processes that it killed for memory, in the cgroup that the supervisor and its workers share
  or, where there is none, on the machine;
- what the worker itself last wrote.
Never raises: where nothing can be read, there is no evidence.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path

_MESSAGES = re.compile(
    r"\bMemoryError\b|OutOfMemoryError|can't allocate memory|Cannot allocate memory|out of memory|std::bad_alloc"
)
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_WHOLE_MACHINE = Path("/proc/vmstat")


def counters(cgroups: str) -> list[Path]:
    """Where the kernel may count, best first, from the text of /proc/self/cgroup (version 1 or 2)."""
    root = Path("/sys/fs/cgroup")
    paths: list[Path] = []
    for line in cgroups.splitlines():
        hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
        if hierarchy == "0" and not controllers:
            # Inside a container the path is the host's, and its own group is at the root.
            paths += [root / path.strip("/") / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            paths += [root / "memory" / path.strip("/") / "memory.oom_control", root / "memory/memory.oom_control"]
    return [*paths, _WHOLE_MACHINE]


def kills_for_memory(text: str) -> int | None:
    """The count in the text of such a file, or None where it has none."""
    found = _COUNT.search(text)
    return int(found[1]) if found else None


class MemoryWatch:
    """Remembers how many processes had been killed for memory when it was made.

    Args:
        paths: files with a count, the first that has one being used; by default this process's cgroup, then the
            machine.
    """

    def __init__(self, paths: Iterable[Path] | None = None) -> None:
        self._path, self._before = _first(counters(_read(Path("/proc/self/cgroup"))) if paths is None else paths)

    def note(self, returncode: int, last_words: str, *, killed: bool = False) -> str:
        """Return a sentence where a worker most likely ran out of memory, else "".

        Args:
            returncode: how it ended, as subprocess has it (-N: signal N).
            last_words: the last text of its standard error.
            killed: whether the supervisor killed it. Then its end is no evidence, and only what it wrote is.
        """
        if returncode == 0:
            return ""
        # A traceback's last lines; a script may well have caught and printed an earlier one.
        message = _MESSAGES.search("\n".join(last_words.splitlines()[-12:]))
        if returncode == -signal.SIGKILL and not killed and (kills := self._kills()):
            where = "on this machine" if self._path == _WHOLE_MACHINE else "in this memory cgroup"
            return f"likely out of memory: the kernel killed {kills} process{'es' if kills > 1 else ''} for it {where}"
        if message:
            return f"likely out of memory: its last lines have {message[0]!r}"
        if returncode == -signal.SIGKILL and not killed:
            return "it came from outside the run; when memory runs short the kernel sends it (see dmesg)"
        return ""

    def _kills(self) -> int:
        now = kills_for_memory(_read(self._path)) if self._path is not None else None
        return 0 if now is None else max(0, now - self._before)  # less where the group was made anew


def _first(paths: Iterable[Path]) -> tuple[Path | None, int]:
    for path in paths:
        if (count := kills_for_memory(_read(path))) is not None:
            return path, count
    return None, 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
