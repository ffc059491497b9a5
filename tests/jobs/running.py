"""A job under way: any command, known by a mark in the environment of its processes.

Contract: `start` begins it in a folder, and whatever is left of it at the end of the block is killed. What it says is
read as it comes. `Running.end` waits for its end, for `LIMIT` seconds at most, and fails where a process of it is still
there a moment later. `run` and `started` do that with `allstep run` and its arguments.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.jobs.job import Job, Line, Stream
from tests.jobs.launchers import ALLSTEP, environment
from tests.jobs.processes import LIMIT, command_of, with_variable

GONE = 10.0
"""Seconds in which the last processes of a job have to end after its own; none but a service's needs any."""


@dataclass
class Running:
    """A job that was started."""

    process: subprocess.Popen[str]
    mark: str
    folder: Path
    began: float
    said: list[Line] = field(default_factory=list)
    _came: threading.Condition = field(default_factory=threading.Condition)
    _readers: list[threading.Thread] = field(default_factory=list)

    def read(self) -> None:
        """Begin to read what the job says; once, since two readers of one stream lose lines."""
        assert not self._readers, "it is read already"
        streams: list[tuple[Stream, IO[str] | None]] = [("out", self.process.stdout), ("err", self.process.stderr)]
        for name, stream in streams:
            if stream is not None and not stream.closed:
                reader = threading.Thread(target=self._read, args=(name, stream), daemon=True)
                reader.start()
                self._readers.append(reader)

    def await_line(self, words: str, count: int = 1) -> list[str]:
        """Wait for so many lines with these words and return them."""

        return self._await(lambda line: words in line.text, count, repr(words))

    def await_out(self, count: int) -> list[str]:
        """Wait for so many lines of standard output and return them."""
        return self._await(lambda line: line.stream == "out", count, "anything")[:count]

    def end(self, *, leaves: bool = False, limit: float = LIMIT) -> Job:
        """Wait for the job's end; `leaves`: something of it may stay."""
        if not self._readers:
            self.read()
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end in {limit} s; it said:\n{self._text()}") from None
        ended = time.monotonic()
        left = [] if leaves else self._left()
        assert not left, f"left behind: {left}; the job said:\n{self._text()}"
        for reader in self._readers:
            reader.join(0.1 if leaves else GONE)
        return Job(code, tuple(self.said), self.began, ended, left, self.folder, self.process.pid)

    def pids(self) -> list[int]:
        """Processes of this job that live, its own first."""
        found = self._marked()
        return sorted(found, key=lambda pid: pid != self.process.pid)

    def kill(self) -> None:
        """Kill whatever is left."""
        deadline = time.monotonic() + GONE
        while (left := self._marked()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)  # descendants are not ours to wait for

    def _await(self, fits: Callable[[Line], bool], count: int, words: str) -> list[str]:
        def found() -> list[str]:
            return [line.text.rstrip("\n") for line in self.said if fits(line)]

        with self._came:
            came = self._came.wait_for(lambda: len(found()) >= count, LIMIT)
        assert came, f"{words} was not said {count} times in:\n{self._text()}"
        return found()

    def _marked(self) -> list[int]:
        return with_variable(self.mark)

    def _left(self) -> list[str]:
        deadline = time.monotonic() + GONE
        while (left := self._marked()) and time.monotonic() < deadline:
            time.sleep(0.02)  # descendants are not ours to wait for
        return [command_of(pid) for pid in left]

    def _read(self, name: Stream, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError):  # closed at the end of the block, with a descendant still writing
            for line in stream:
                with self._came:
                    self.said.append(Line(time.monotonic(), name, line))
                    self._came.notify_all()

    def _text(self) -> str:
        return "".join(line.text for line in self.said)


@contextlib.contextmanager
def start(
    folder: Path,
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    reads: bool = True,
    passed: Sequence[int] = (),
) -> Iterator[Running]:
    """Start a command in `folder`.

    Args:
        env: added to the environment.
        stdin: a short text for its standard input, which is empty otherwise.
        reads: read what it says from now on; otherwise the test does, or `end`.
        passed: descriptors that it has too.
    """
    mark = f"TEST_JOB_MARK={uuid.uuid4().hex}"
    began = time.monotonic()
    process = subprocess.Popen(
        list(map(str, argv)),
        cwd=folder,
        env=environment(env) | dict([mark.split("=")]),
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=passed,
    )
    running = Running(process, mark, folder, began)
    if process.stdin is not None:
        process.stdin.write(stdin or "")
        process.stdin.close()
    if reads:
        running.read()
    try:
        yield running
    finally:
        running.kill()
        process.wait(LIMIT)
        for reader in running._readers:
            reader.join(GONE)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def started(
    folder: Path, *arguments: str | Path, env: Mapping[str, str] | None = None, reads: bool = True
) -> Iterator[Running]:
    """Start `allstep run` with these arguments."""
    with start(folder, [*ALLSTEP, "run", *arguments], env=env, reads=reads) as running:
        yield running


def run(
    folder: Path,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    command: Sequence[str | Path] = (*ALLSTEP, "run"),
    leaves: bool = False,
) -> Job:
    """Run `allstep run`, or another command, with these arguments to its end."""
    with start(folder, [*command, *arguments], env=env, stdin=stdin) as running:
        return running.end(leaves=leaves)
