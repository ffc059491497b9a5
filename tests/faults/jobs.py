"""Jobs that meet a fault: started as a user starts them, waited for, and looked at afterwards.

Contract: `rehearse` runs a script of `scripts/` to its end under a launcher, with a fault in the environment or on the
command line, and gives what came of it: exit code, output, `failure.json`, the seconds from the fault to the end, and
which of the job's processes are still there a moment later. A job is known by a mark in its processes' environment. No
job outlives the call: what is left of one that does not end in `LIMIT` seconds is killed, and the test fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from allstep.testing import FaultPlan

SCRIPTS = Path(__file__).with_name("scripts")
ROOT = Path(__file__).parents[2]

BOUND = 5.0
"""Seconds from a fault to the end of the whole job, unless a row of the matrix says otherwise; see `Job.bound`."""

LIMIT = 90.0
GONE = 5.0
STRIKES = "allstep: a rehearsed fault strikes"
_MARK = "FAULTS_TEST_JOB"
_NOT_INHERITED = (
    "OMP_NUM_THREADS",
    "NO_COLOR",
    "PYTHONUNBUFFERED",
    "RANK",
    "WORLD_SIZE",
    "ALLSTEP_FAULT",
    "MASTER_PORT",
)

Launcher = Literal["allstep", "torchrun"]


@dataclass(frozen=True)
class Job:
    """What came of a job. `report` is the failure.json of the last attempt, {} where there is none.

    `said` are the lines of standard output and error with the time at which each came; `ended` is when the job's own
    process ended, on the same clock. `left` are processes of the job that are still there.
    """

    code: int
    said: Sequence[tuple[float, str]]
    began: float
    ended: float
    report: Mapping[str, Any]
    left: Sequence[str]
    folder: Path
    pid: int
    slowness: float

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n".join(line for _, line in self.said)

    @property
    def block(self) -> list[str]:
        """The report's lines, from its headline on."""
        lines = [line for _, line in self.said]
        starts = [n for n, line in enumerate(lines) if line.startswith("allstep: ") and " failed: " in line]
        assert starts, f"there is no report in:\n{self.text}"
        return lines[starts[-1] :]

    def since(self, words: str) -> float:
        """Seconds from the first line with these words to the job's end."""
        at = next((at for at, line in self.said if words in line), None)
        assert at is not None, f"{words!r} was not said in:\n{self.text}"
        return self.ended - at

    def bound(self, seconds: float = BOUND) -> float:
        """So many seconds of a machine that has nothing else to do, on this one."""
        return seconds * self.slowness

    @property
    def cause(self) -> Mapping[str, Any]:
        """The first cause as failure.json has it."""
        assert self.report, f"there is no failure.json; the job said:\n{self.text}"
        found: Mapping[str, Any] = self.report["cause"]
        return found


@dataclass
class Running:
    """A job under way."""

    process: subprocess.Popen[str]
    mark: str
    folder: Path
    began: float
    said: list[tuple[float, str]] = field(default_factory=list)
    _came: threading.Condition = field(default_factory=threading.Condition)
    _readers: list[threading.Thread] = field(default_factory=list)

    def read(self) -> None:
        """Begin to read what the job says."""
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
            reader.start()
            self._readers.append(reader)

    def await_line(self, words: str, count: int = 1) -> list[str]:
        """Wait for so many lines with these words and return them."""

        def found() -> list[str]:
            return [line for _, line in self.said if words in line]

        with self._came:
            came = self._came.wait_for(lambda: len(found()) >= count, LIMIT)
        assert came, f"{words!r} was not said {count} times in:\n" + "\n".join(line for _, line in self.said)
        return found()

    def end(self) -> Job:
        """Wait for the job's end."""
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end in {LIMIT} s; it said:\n" + self._text()) from None
        ended = time.monotonic()
        for reader in self._readers:
            reader.join(GONE)
        left = self._left()
        return Job(
            code,
            tuple(self.said),
            self.began,
            ended,
            _report(self.folder),
            left,
            self.folder,
            self.process.pid,
            slowness(),
        )

    def pids(self) -> list[int]:
        """Processes of this job that live."""
        return [pid for pid in _marked(self.mark) if pid != self.process.pid or self.process.poll() is None]

    def kill(self) -> None:
        """Kill whatever is left."""
        deadline = time.monotonic() + GONE
        while (left := _marked(self.mark)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)

    def _left(self) -> list[str]:
        deadline = time.monotonic() + GONE
        while (pids := _marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [_command(pid) for pid in pids]

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            with self._came:
                self.said.append((time.monotonic(), line.rstrip("\n")))
                self._came.notify_all()

    def _text(self) -> str:
        return "\n".join(line for _, line in self.said)


def slowness() -> float:
    """How many processes want each core of this machine, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def environment(extra: Mapping[str, str] | None = None, mark: str = "") -> dict[str, str]:
    """This process's environment without what would change a job, and with `extra`."""
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    path = os.pathsep.join([str(ROOT / "src"), inherited.get("PYTHONPATH", "")])
    fixed = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return inherited | fixed | {_MARK: mark} | dict(extra or {})


def command(
    launcher: Launcher, nproc: int, script: Path, options: Sequence[str], arguments: Sequence[str]
) -> list[str]:
    """The command line of a job."""
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    else:
        start = ["-m", "allstep", "run", "--nproc", str(nproc), "--name", "job"]
    return [sys.executable, *start, *options, str(script), *arguments]


@contextlib.contextmanager
def start(folder: Path, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Start a job in `folder`; whatever is left of it at the end of the block is killed."""
    mark = uuid.uuid4().hex
    began = time.monotonic()
    process = subprocess.Popen(
        list(argv),
        cwd=folder,
        env=environment(env, mark),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    running = Running(process, mark, folder, began)
    running.read()
    try:
        yield running
    finally:
        running.kill()
        process.wait(LIMIT)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def started(
    folder: Path,
    script: str,
    *arguments: str,
    fault: FaultPlan | None = None,
    nproc: int = 2,
    options: Sequence[str] = (),
    launcher: Launcher = "allstep",
    env: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Start a script of `scripts/` as a job.

    Args:
        fault: what to rehearse; with `allstep run` given as `--fault`, else in the environment.
    """
    variables = dict(env or {})
    given = list(options)
    if fault is not None and launcher == "allstep":
        given += ["--fault", fault.to_text()]
    elif fault is not None:
        variables |= fault.to_environ()
    with start(folder, command(launcher, nproc, SCRIPTS / script, given, arguments), variables) as running:
        yield running


def rehearse(folder: Path, script: str, *arguments: str, **options: Any) -> Job:
    """Run a job to its end; arguments as of `started`. Nothing of it may be left."""
    with started(folder, script, *arguments, **options) as running:
        job = running.end()
    assert not job.left, f"left behind: {job.left}; the job said:\n{job.text}"
    return job


def by_hand(folder: Path, script: str, *places: Mapping[str, str]) -> list[Job]:
    """Start one process of a script per place, without a launcher, and wait for all; nothing may be left."""
    with contextlib.ExitStack() as stack:
        argv = [sys.executable, str(SCRIPTS / script)]
        running = [stack.enter_context(start(folder, argv, place)) for place in places]
        jobs = [each.end() for each in running]
    assert not any(job.left for job in jobs), [job.left for job in jobs]
    return jobs


def place(rank: int, world_size: int, port: int, **more: str) -> dict[str, str]:
    """The variables with which a person starts a rank by hand on one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **more,
    }


def _report(folder: Path) -> Mapping[str, Any]:
    attempts = sorted(folder.glob("runs/job/attempt_*"), key=lambda path: int(path.name.split("_")[1]))
    if not attempts or not (attempts[-1] / "failure.json").exists():
        return {}
    content: Mapping[str, Any] = json.loads((attempts[-1] / "failure.json").read_text())
    return content


def _marked(mark: str) -> list[int]:
    """Processes that have the mark in their environment and are not zombies."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid}: " + Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return str(pid)
