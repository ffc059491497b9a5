"""One start of a rehearsed script: `allstep run` on this machine, and what a cluster sends it meanwhile.

Contract: `run_start` begins it, sends the signals once rank 0 stands after the iteration that was asked for, lets it go
on, and returns when nothing of it is left. Signals count from that moment. A rank's pid is the one in its trace. What
it says is in the run's folder: `output-K.log`, and `allstep run`'s own logs. Nothing that this machine's environment
says about a job, a launcher or a place reaches the script.

What can go wrong: a start that takes longer than its limit is killed, and the answer says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allstep.protocol.save_record import MEASURE, SAVES
from allstep.rehearsal.interruption import SentSignal
from allstep.rehearsal.iteration_trace import GO, REACHED, StartOrder, read_traces
from allstep.rehearsal.rehearsal_request import RehearsalRequest

_SCRIPT = str(Path(__file__).with_name("rehearsed_script.py"))
_LOOK_S = 0.02
_HEARD_S = 0.3
"""How long a signal may take from `allstep run` to a rank, before the ranks are let go on."""

_NOT_INHERITED = ("ALLSTEP_", "SLURM", "TORCHELASTIC_", "PMI", "OMPI_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_")


@dataclass(frozen=True, slots=True)
class StartEnd:
    """How a start ended.

    Args:
        code: of `allstep run`.
        reached_at: whether rank 0 came to the place of the interruption.
        sent: the signals that were sent.
        seconds: from the first of them to the end; None without any.
        timed_out: it had to be killed because it took too long.
        output: what it said.
    """

    code: int
    reached_at: bool
    sent: tuple[SentSignal, ...]
    seconds: float | None
    timed_out: bool
    output: Path


@dataclass(frozen=True, slots=True)
class PlannedStart:
    """One start to make.

    Args:
        folder: of the run that it is a start of.
        number: which one, from 0.
        ranks: how many.
        last: the iteration after which the script ends; None for its own end.
        variables: what it has in its environment besides.
        measures: it saves once at its beginning.
        meet_at: the iteration after which signals are sent; None for no signals.
        restarts: how often `allstep run` begins anew by itself.
    """

    folder: Path
    number: int
    ranks: int
    last: int | None = None
    variables: Mapping[str, str] | None = None
    measures: bool = False
    meet_at: int | None = None
    restarts: int = 0


def run_start(
    request: RehearsalRequest, start: PlannedStart, signals: Callable[[], Sequence[SentSignal]] = tuple
) -> StartEnd:
    """Run one start to its end.

    Args:
        request: what is rehearsed.
        start: which start it is.
        signals: asked when rank 0 has come to its place; what is to be sent, in order.
    """
    folder = start.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in (REACHED, GO):
        (folder / name).unlink(missing_ok=True)
    output = folder / f"output-{start.number}.log"
    with output.open("wb") as said:
        process = subprocess.Popen(
            _command(request, start),
            cwd=request.workdir,
            env=_environment(request, start),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            return _Watched(start, process, output, time.monotonic() + request.timeout).wait(signals)
        finally:
            # Its workers do not outlive it.
            process.kill()
            process.wait()


class _Watched:
    """A start under way."""

    def __init__(self, start: PlannedStart, process: subprocess.Popen[bytes], output: Path, deadline: float) -> None:
        self._start = start
        self._process = process
        self._output = output
        self._deadline = deadline
        self._sent: list[SentSignal] = []

    def wait(self, signals: Callable[[], Sequence[SentSignal]]) -> StartEnd:
        """Wait for its end, and send what is due."""
        folder, began = self._start.folder, 0.0
        due: list[SentSignal] = []
        reached = timed_out = False
        while self._process.poll() is None:
            now = time.monotonic()
            if now > self._deadline:
                timed_out = True
                self._send(SentSignal(0.0, signal.SIGKILL, "all"))
            elif not reached and (folder / REACHED).exists():
                reached, began = True, now
                due = list(signals())
                self._send_due(due, 0.0)
                self._wait_for_end(_HEARD_S)
                (folder / GO).touch()
            elif reached:
                self._send_due(due, now - began)
            self._wait_for_end(_LOOK_S)
        seconds = time.monotonic() - began if reached else None
        code = self._process.returncode
        # A death by signal N as a shell and srun say it.
        return StartEnd(code if code >= 0 else 128 - code, reached, tuple(self._sent), seconds, timed_out, self._output)

    def _wait_for_end(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _send_due(self, due: list[SentSignal], since: float) -> None:
        while due and due[0].after <= since:
            sent = due.pop(0)
            self._send(sent)
            self._sent.append(sent)

    def _send(self, sent: SentSignal) -> None:
        ranks = [each.pid for each in read_traces(self._start.folder, self._start.number).ranks]
        launcher = self._process.pid
        targets = {"launcher": [launcher], "all": [launcher, *ranks]}
        for pid in targets[sent.to] if isinstance(sent.to, str) else ranks[sent.to : sent.to + 1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent.number)


def _command(request: RehearsalRequest, start: PlannedStart) -> list[str]:
    order = StartOrder(str(start.folder.resolve()), start.last, start.meet_at)
    options = {
        "nproc": str(start.ranks),
        "device": request.device,
        "runs": str(start.folder.resolve().parent),
        "name": start.folder.name,
        "mesh": request.mesh,
        "max-restarts": str(start.restarts) if start.restarts else None,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    variables = [word for name, value in request.env.items() for word in ("--env", f"{name}={value}")]
    kind = "module" if request.module else "script"
    script = [_SCRIPT, order.to_text(), kind, request.script, *request.arguments]
    return [sys.executable, "-m", "allstep", "run", *given, *variables, *script]


def _environment(request: RehearsalRequest, start: PlannedStart) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_INHERITED) and name not in ("RANK", "WORLD_SIZE")
    }
    # The same number of threads at any number of ranks: sums over others are rounded otherwise.
    inherited.setdefault("OMP_NUM_THREADS", "1")
    return {
        **inherited,
        **(start.variables or {}),
        SAVES: str((start.folder / "saves.jsonl").resolve()),
        **({MEASURE: "1"} if start.measures else {}),
    }
