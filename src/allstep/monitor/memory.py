"""Evidence that a rank failed because memory ran out.

Contract: who watches over ranks makes a `MemoryWatch` before they can fail. `note` then says, for a worker that ended,
whether memory is the likely reason, or "". `remark` says it for a rank that fails and has not ended. There are two
kinds of evidence:
- the kernel's own count of processes that it killed for memory, in the job's cgroup or, for a rank that was killed
  itself and where no cgroup counts, on the machine. Any process counts that is in the cgroup: a worker of a data loader
  is killed as often as the rank, which then fails with an exception that has no word of memory;
- what the worker itself last wrote.
Never raises: where nothing can be read, there is no evidence.

Where the kernel counts: version 2 of cgroups in `memory.events` of the group of what was killed and of all groups
above. Version 1 in `memory.oom_control` of its group alone, so there the groups below the job's are summed. The job's
group is the one that a scheduler named after it (`job_17`), else that of the process which asks.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

from allstep.exit_codes import HANG, PEER_LOST, PREEMPTED
from allstep.protocol.last_words import about_a_peer

ROOT = Path("/sys/fs/cgroup")
"""Where the system mounts its cgroups."""

MACHINE = Path("/proc/vmstat")
"""Where the kernel counts for the whole machine."""

_MESSAGES = re.compile(
    r"\bMemoryError\b|OutOfMemoryError|can't allocate memory|Cannot allocate memory|out of memory|std::bad_alloc"
    r"|ALLOC_FAILED",
    re.IGNORECASE,
)
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_JOB = re.compile(r"job[._-]?\d")  # how SLURM and LSF name the group of a job


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says, by its type or its text, that memory ran out, of the host or of a device."""
    return _MESSAGES.search(f"{type(error).__name__}: {error}") is not None


def counters(cgroups: str, root: Path = ROOT) -> list[Path]:
    """The files in which the kernel counts for this job, of one version of cgroups; empty where there are none.

    Args:
        cgroups: the text of /proc/self/cgroup.
        root: where cgroups are mounted.
    """
    for line in cgroups.splitlines():
        hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
        if hierarchy == "0" and not controllers:
            found = next((file for file in _hierarchical(root, path) if _count(file) is not None), None)
            if found is not None:
                return [found]
        elif "memory" in controllers.split(",") and (files := _summed(root / "memory", path)):
            return files
    return []


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """The groups that may be the job's, the likeliest first: from the one named after the job down to our own."""
    parts = Path(path.strip("/")).parts
    if ".." in parts:  # the process is above what is mounted here
        parts = ()
    job = next((at for at, part in enumerate(parts, 1) if _JOB.match(part)), len(parts))
    for length in range(job, len(parts) + 1):
        yield mount.joinpath(*parts[:length])
    yield mount  # in a container the path is the host's, and what is mounted is the container's own group


def _hierarchical(root: Path, path: str) -> Iterator[Path]:
    for group in _groups(root, path):
        yield group / "memory.events"


def _summed(mount: Path, path: str) -> list[Path]:
    for group in _groups(mount, path):
        if _count(group / "memory.oom_control") is not None:
            # Below a group that is not known to be a job's there may be anybody's.
            own = [group / "memory.oom_control"]
            return sorted(group.rglob("memory.oom_control")) if _JOB.match(group.name) else own
    return []


def kills_for_memory(text: str) -> int | None:
    """The count in the text of such a file, or None where it has none."""
    found = _COUNT.search(text)
    return int(found[1]) if found else None


class MemoryWatch:
    """Remembers how many processes had been killed for memory when it was made.

    Args:
        cgroups: the text of /proc/self/cgroup; by default this process's.
        root: where cgroups are mounted.
        machine: the file with the machine's count.
    """

    def __init__(self, cgroups: str | None = None, root: Path = ROOT, machine: Path = MACHINE) -> None:
        self._cgroups = _read(Path("/proc/self/cgroup")) if cgroups is None else cgroups
        self._root = root
        self._machine = machine
        self._before = self._counts()
        self._before_on_machine = _count(machine) or 0

    def remark(self) -> str:
        """A sentence for a rank that fails, where processes of the job were killed for memory, else ""."""
        kills = self._kills()
        return f"likely out of memory: {_killed(kills)} in this job's memory cgroup" if kills else ""

    def note(self, returncode: int, last_words: str, *, killed: bool = False) -> str:
        """Return a sentence where a worker most likely ran out of memory, else "".

        Args:
            returncode: how it ended, as subprocess has it (-N: signal N).
            last_words: the last text of its standard error.
            killed: whether the supervisor killed it. Then its end is no evidence, and only what it wrote is.
        """
        if returncode in (0, HANG, PEER_LOST, PREEMPTED):
            return ""
        if not killed and not about_a_peer(last_words) and (said := self.remark()):
            return said
        # A traceback's last lines; a script may well have caught and printed an earlier one.
        message = _MESSAGES.search("\n".join(last_words.splitlines()[-12:]))
        if returncode == -signal.SIGKILL and not killed and (kills := self._kills_on_machine()):
            return f"likely out of memory: {_killed(kills)} on this machine"
        if message:
            return f"likely out of memory: its last lines have {message[0]!r}"
        if returncode == -signal.SIGKILL and not killed:
            return "it came from outside the run; when memory runs short the kernel sends it (see dmesg)"
        return ""

    def _kills(self) -> int:
        # A group that was made since then begins at 0; one that was made anew counts less.
        return sum(max(0, now - self._before.get(path, 0)) for path, now in self._counts().items())

    def _kills_on_machine(self) -> int:
        # Where a cgroup counts for the job, what was killed elsewhere on the machine is no evidence.
        return 0 if self._before else max(0, (_count(self._machine) or 0) - self._before_on_machine)

    def _counts(self) -> dict[Path, int]:
        counts = {path: _count(path) for path in counters(self._cgroups, self._root)}
        return {path: count for path, count in counts.items() if count is not None}


def _killed(kills: int) -> str:
    return f"the kernel killed {kills} process{'es' if kills > 1 else ''} for it"


def _count(path: Path) -> int | None:
    return kills_for_memory(_read(path))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
