"""The supervisor: starts the workers of one attempt, passes on their output, and ends all when one fails.

Contract: `supervise` is called from the main thread with what to start, and returns the run's exit status when no
worker is left, nor anything in a worker's process group. One loop waits for everything at once: workers' ends (pidfd),
their output, signals, room to write, and the next deadline; nothing is polled. What it does:
- All workers exit with 0: so does the run.
- One fails: the others have `LEAVE` seconds to notice by themselves, then SIGKILL (a pending gloo collective cannot be
  aborted, and SIGTERM is for preemption only). The status is that of the end which `first_cause` chooses, and the
  report on standard error is about that rank.
- A signal to stop: passed on (SIGINT as such, the others as SIGTERM). After `grace` seconds, or a second signal,
  SIGKILL. The status is 128 + the first signal's number. SIGUSR1 and SIGUSR2 are passed on and change nothing here.
- A worker's descendants that hold its output open are read for `LINGER` seconds after the last worker's end, then
  killed.
What can go wrong: a worker cannot be started; the others are killed and `LaunchError` says why.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from allstep.errors import LaunchError
from allstep.launch.ending import WorkerEnd, exit_status, first_cause
from allstep.launch.folder import AttemptFolder
from allstep.launch.outlet import Outlet
from allstep.launch.plan import WorkerPlan
from allstep.launch.process import WorkerProcess, start_worker
from allstep.launch.rank_output import RankOutput, Stream
from allstep.launch.report import failure_report
from allstep.launch.signals import PASS_ON, STOP, Signals

LEAVE = 1.0
"""Seconds that peers of a failed worker have to leave by themselves."""

LINGER = 1.0
"""Seconds for which output is read after the last worker has ended."""

_CHUNK = 1 << 16
_BACKLOG = 1 << 20


def supervise(
    plans: Sequence[WorkerPlan],
    *,
    folder: AttemptFolder | None,
    shown: frozenset[int],
    grace: float,
    environ: Mapping[str, str],
) -> int:
    """Run one attempt to its end.

    Args:
        plans: the workers to start.
        folder: where their logs go, or None for no logs.
        shown: the ranks whose output is passed on.
        grace: seconds between a signal to stop and SIGKILL.
        environ: the supervisor's environment (NO_COLOR is looked at).

    Returns:
        The run's exit status.

    Raises:
        LaunchError: a worker could not be started, or a log not be made.
    """
    with Signals() as signals, contextlib.closing(_Attempt(plans, folder, shown, grace, environ, signals)) as attempt:
        attempt.start()
        return attempt.run()


@dataclass(frozen=True, slots=True)
class _Source:
    """What a selector's key stands for."""

    kind: Literal["signals", "exit", "stdout", "stderr", "outlet"]
    rank: int = -1


class _Attempt:
    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        folder: AttemptFolder | None,
        shown: frozenset[int],
        grace: float,
        environ: Mapping[str, str],
        signals: Signals,
    ) -> None:
        self._plans = plans
        self._folder = folder
        self._grace = grace
        self._signals = signals
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals.fd, selectors.EVENT_READ, _Source("signals"))
        self._outlets: dict[Stream, Outlet] = {"stdout": Outlet(1), "stderr": Outlet(2)}
        self._shown = shown
        self._coloured = _coloured(self._outlets, environ)
        self._workers: dict[int, WorkerProcess] = {}
        self._outputs: dict[int, RankOutput] = {}
        self._open: dict[int, _Source] = {}  # pipes that have not ended, by descriptor
        self._ends: dict[int, WorkerEnd] = {}
        self._killed: set[int] = set()
        self._stopped_by: signal.Signals | None = None
        self._kill_at: float | None = None
        self._reading = True
        self._told_closed = False

    def start(self) -> None:
        workers = f"{len(self._plans)} worker{'s' if len(self._plans) > 1 else ''}"
        kept = f", output kept in {self._folder.path}" if self._folder is not None else ""
        self._say(f"run {self._plans[0].run_id}: {workers}{kept}")
        for plan in self._plans:
            try:
                self._outputs[plan.rank] = RankOutput(
                    plan.rank,
                    self._outlets if plan.rank in self._shown else {},
                    prefixed=len(self._plans) > 1,
                    coloured=self._coloured,
                    log=self._folder.log(plan.rank) if self._folder is not None else None,
                    warn=self._say,
                )
                worker = start_worker(plan)
            except OSError as error:
                raise LaunchError(f"rank {plan.rank} of {len(self._plans)} could not be started: {error}") from error
            self._workers[plan.rank] = worker
            self._selector.register(worker.exit_fd, selectors.EVENT_READ, _Source("exit", plan.rank))
            for fd, source in (
                (worker.stdout, _Source("stdout", plan.rank)),
                (worker.stderr, _Source("stderr", plan.rank)),
            ):
                self._open[fd] = source
                self._selector.register(fd, selectors.EVENT_READ, source)

    def run(self) -> int:
        while len(self._ends) < len(self._workers):
            self._wait(self._kill_at)
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._kill()
        self._linger()
        status = self._conclude()
        self._write_out()
        return status

    def close(self) -> None:
        for worker in self._workers.values():
            worker.release()
        for output in self._outputs.values():
            output.close()
        self._selector.close()

    def _wait(self, until: float | None) -> bool:
        """Wait for the next events and act on each; return whether a signal to stop was among them."""
        self._adjust()
        timeout = None if until is None else max(0.0, until - time.monotonic())
        came: list[signal.Signals] = []
        for key, _ in self._selector.select(timeout):
            source: _Source = key.data
            if source.kind == "signals":
                came += self._signals.take()
            elif source.kind == "exit":
                self._note_end(source.rank, key.fd)
            elif source.kind == "outlet":
                for outlet in self._outlets.values():
                    outlet.flush()
            else:
                self._read(key.fd)
        for number in came:
            self._heed(number)
        return any(number in STOP for number in came)

    def _adjust(self) -> None:
        """Wait for room where a reader is slow, and stop reading the workers while far too much waits."""
        for outlet in self._outlets.values():
            waiting = outlet.fd in self._selector.get_map()
            if outlet.backlog and not waiting:
                self._selector.register(outlet.fd, selectors.EVENT_WRITE, _Source("outlet"))
            elif waiting and not outlet.backlog:
                self._selector.unregister(outlet.fd)
        reading = all(outlet.backlog < _BACKLOG for outlet in self._outlets.values())
        if reading != self._reading:
            self._reading = reading
            for fd, source in self._open.items():
                if reading:
                    self._selector.register(fd, selectors.EVENT_READ, source)
                else:
                    self._selector.unregister(fd)
        if not self._told_closed and self._outlets["stdout"].closed:
            self._told_closed = True
            kept = f"; what the ranks write is in {self._folder.path}" if self._folder is not None else ""
            self._say(f"nobody reads standard output any more, the run goes on{kept}")

    def _read(self, fd: int) -> bool:
        """Pass on what a pipe has; return false when it has ended."""
        source = self._open[fd]
        assert source.kind in ("stdout", "stderr")
        output = self._outputs[source.rank]
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        if data:
            output.feed(source.kind, data)
            return True
        del self._open[fd]
        if self._reading:
            self._selector.unregister(fd)
        output.end(source.kind)
        return False

    def _note_end(self, rank: int, exit_fd: int) -> None:
        self._selector.unregister(exit_fd)
        now = time.monotonic()
        code = self._workers[rank].returncode()
        end = WorkerEnd(rank, code, now, killed=rank in self._killed and code == -signal.SIGKILL)
        self._ends[rank] = end
        if end.failed and self._stopped_by is None and self._kill_at is None:
            self._kill_at = now + LEAVE

    def _heed(self, number: signal.Signals) -> None:
        remaining = self._remaining()
        if number in PASS_ON:
            for worker in remaining:
                worker.send(number)
        elif not remaining:
            return  # the run is over; whoever waits in _wait is told
        elif self._stopped_by is None and not any(end.failed for end in self._ends.values()):
            self._stopped_by = number
            self._kill_at = time.monotonic() + self._grace
            self._say(
                f"{number.name}: passed on to the workers, which have {self._grace:g} s to leave; "
                "a second signal ends them at once"
            )
            for worker in remaining:
                worker.send(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        else:
            self._kill()

    def _kill(self) -> None:
        self._kill_at = None
        for worker in self._remaining():
            self._killed.add(worker.rank)
            worker.kill_group()

    def _remaining(self) -> list[WorkerProcess]:
        return [worker for rank, worker in self._workers.items() if rank not in self._ends]

    def _linger(self) -> None:
        """Read on until the pipes end or `LINGER` has passed, then take what is in them."""
        until = time.monotonic() + LINGER
        while self._open and time.monotonic() < until and not self._wait(until):
            pass
        for worker in self._workers.values():
            worker.kill_group()
        for fd, source in list(self._open.items()):
            os.set_blocking(fd, False)
            room = _BACKLOG // _CHUNK  # more than a pipe holds, so only a living writer could exceed it
            while room and self._read(fd):
                room -= 1
            if fd in self._open and source.kind in ("stdout", "stderr"):
                self._outputs[source.rank].end(source.kind)

    def _conclude(self) -> int:
        if self._stopped_by is not None:
            killed = _ranks(sorted(rank for rank, end in self._ends.items() if end.killed))
            self._say(f"stopped by {self._stopped_by.name}" + (f"; {killed} had to be killed" if killed else ""))
            return 128 + self._stopped_by
        ends = [
            WorkerEnd(end.rank, end.returncode, end.at, end.killed, self._outputs[end.rank].last_words())
            for end in self._ends.values()
        ]
        cause = first_cause(ends)
        if cause is None:
            return 0
        log = self._folder.log(cause.rank) if self._folder is not None else None
        self._say(failure_report(cause, ends, name=self._plans[0].run_id, log=log).rstrip("\n"))
        return exit_status(cause.returncode)

    def _write_out(self) -> None:
        """Wait until everything is written, or a signal says that nobody cares."""
        while any(outlet.backlog for outlet in self._outlets.values()) and not self._wait(None):
            pass

    def _say(self, text: str) -> None:
        self._outlets["stderr"].write(f"allstep: {text}\n".encode(errors="replace"))


def _coloured(outlets: Mapping[Stream, Outlet], environ: Mapping[str, str]) -> frozenset[Stream]:
    if environ.get("NO_COLOR"):
        return frozenset()
    return frozenset(stream for stream, outlet in outlets.items() if os.isatty(outlet.fd))


def _ranks(ranks: Iterable[int]) -> str:
    named = [str(rank) for rank in ranks]
    return f"rank{'s' if len(named) > 1 else ''} {', '.join(named)}" if named else ""
