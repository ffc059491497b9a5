"""`allstep run` as tests use it: a real process, started in a folder of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LIMIT = 60.0

ALLSTEP = [sys.executable, "-m", "allstep"]

_FROM_THE_OUTER_RUN = ("OMP_NUM_THREADS", "NO_COLOR", "PYTHONUNBUFFERED", "RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would change a run, and with `extra`."""
    inherited = {name: value for name, value in os.environ.items() if name not in _FROM_THE_OUTER_RUN}
    return inherited | {"CUDA_VISIBLE_DEVICES": ""} | dict(extra or {})


def script(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("import os, sys\nrank = int(os.environ.get('RANK', 0))\n" + text)
    return path


def run(
    folder: Path,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    command: Sequence[str] = (*ALLSTEP, "run"),
) -> subprocess.CompletedProcess[str]:
    """Run `allstep run` in `folder` to its end."""
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=environment(env),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=LIMIT,
        check=False,
    )


@contextmanager
def started(
    folder: Path, *arguments: str | Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start `allstep run` in `folder`; it is killed at the end of the block if it still runs."""
    process = subprocess.Popen(
        [*ALLSTEP, "run", *map(str, arguments)],
        cwd=folder,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines(stream: IO[str] | None, count: int) -> list[str]:
    """Read `count` lines as they come."""
    assert stream is not None
    read = [stream.readline() for _ in range(count)]
    assert all(line.endswith("\n") for line in read), read
    return [line.rstrip("\n") for line in read]


def pids(said: list[str]) -> list[int]:
    """Return the process ids that lines such as `[1] pid 4711` name."""
    return [int(line.split("pid ")[1]) for line in said]


def await_end(watched: list[int]) -> None:
    """Wait until the processes behind these pidfds have ended; fails after a limit."""
    for fd in watched:
        assert select.select([fd], [], [], LIMIT)[0], "the process is still there"
        os.close(fd)


def watch(processes: list[int]) -> list[int]:
    """Return a pidfd for each process."""
    return [os.pidfd_open(pid) for pid in processes]


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def kill(process: subprocess.Popen[str]) -> None:
    """End a process as `kill -9` does, and wait for that end only."""
    process.send_signal(signal.SIGKILL)
    process.wait(LIMIT)
