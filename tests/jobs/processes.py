"""Processes as tests look at them: which are there, and waiting for their end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from allstep.protocol.connection import is_ready

LIMIT = 90.0
"""Seconds that a test waits for anything at most."""


def pids(said: Iterable[str]) -> list[int]:
    """The process ids that lines such as `[1] pid 4711` name."""
    return [int(line.split("pid ")[1].split()[0]) for line in said]


def watch(processes: Iterable[int]) -> list[int]:
    """A pidfd for each process."""
    return [os.pidfd_open(pid) for pid in processes]


def await_end(watched: Iterable[int], limit: float = LIMIT) -> float:
    """Wait until the processes behind these pidfds have ended; when the last did, on `time.monotonic`."""
    for fd in watched:
        assert is_ready(fd, limit), "the process is still there"
        os.close(fd)
    return time.monotonic()


def await_condition(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    """Wait until something is so that nobody tells."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not so after {limit} s"
        time.sleep(0.01)  # it can only be asked again


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def freeze(pid: int) -> None:
    """Stop a process and wait until each of its threads stands still; until one is scheduled, others run on."""

    def stands_still() -> bool:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return {stat.rsplit(")", 1)[1].split()[0] for stat in stats} == {"T"}

    os.kill(pid, signal.SIGSTOP)
    await_condition(stands_still)


def with_variable(variable: str) -> list[int]:
    """The processes that have NAME=VALUE in their environment; zombies have none."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                if variable.encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def command_of(pid: int) -> str:
    """A process's id and command line."""
    with contextlib.suppress(OSError):
        return f"{pid}: " + Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return str(pid)


@contextlib.contextmanager
def many_open_files() -> Iterator[None]:
    """Descriptors below 1,024, where `select` ends, are all in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while held[-1] < 1024:
            held.append(os.dup(held[0]))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
