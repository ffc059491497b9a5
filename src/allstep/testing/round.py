"""One call of `run_ranks` on warm processes: send each rank its part, wait for the outcomes, keep or end the processes.

Contract: `play` returns what became of the call. It drives the service of the ranks' control channel meanwhile, as a
supervisor does, and stops waiting when that has settled on a cause: then some ranks may stand in a collective that
never comes to an end. If all ranks returned, their processes go back to the pool, else all of the call's processes are
ended. A process that was used before and cannot load the function is replaced by a fresh one, since what an earlier
call imported may be in the way.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.root_cause import Diagnosis
from allstep.monitor.hub import Hub
from allstep.monitor.service import Verdict
from allstep.protocol.server import SocketKey
from allstep.protocol.worker_exit import WorkerExit, signal_name
from allstep.testing.call import Call, Outcome
from allstep.testing.pool import Pool, WarmProcess

LAST_WORDS = 1.0
"""Seconds that the rank of a settled cause has to come to the end of its call, with its exception."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank's call ended. Without an `outcome` the process died.

    `exit_code` is that of a process that died, -N for signal N; `stacks` is where its threads stood.
    """

    outcome: Outcome | None = None
    exit_code: int | None = None
    stacks: str = ""

    @property
    def returned(self) -> bool:
        """Whether the rank gave a result."""
        return self.outcome is not None and self.outcome.end == "returned"

    def describe(self) -> str:
        """What the rank did, with the traceback or the stacks."""
        if self.outcome is None:
            code = self.exit_code
            how = f" ({signal_name(-code)})" if code is not None and code < 0 else ""
            return f"died with exit code {code}{how}" + (f":\n{self.stacks}" if self.stacks else "")
        if self.outcome.end == "unloadable":
            return f"could not load the function or its arguments:\n{self.outcome.text}"
        return f"{self.outcome.end}:\n{self.outcome.text}"


@dataclass(slots=True)
class Played:
    """What became of a call. `ends` has the ranks that came to an end, `late` the stacks of those that did not in time.

    `case` is there where somebody failed before the time was over.
    """

    ends: dict[int, Ended] = field(default_factory=dict)
    late: dict[int, str] = field(default_factory=dict)
    case: Diagnosis | None = None


class Round:
    """A call in the making."""

    def __init__(
        self, calls: Sequence[Call], pool: Pool, listener: socket.socket, nonce: str, limits: HangLimits
    ) -> None:
        self._calls = calls
        self._pool = pool
        self._selector = selectors.DefaultSelector()
        self._hub = Hub(
            self._selector, listener, nonce=nonce, attempt=0, world_size=len(calls), limits=limits, supervised=True
        )
        self._processes: list[WarmProcess] = []
        self._played = Played()

    def play(self, timeout: float) -> Played:
        """Make the calls, one per rank.

        Args:
            timeout: seconds for the whole of it.
        """
        deadline = time.monotonic() + timeout
        played = self._played
        with contextlib.closing(self._selector), contextlib.closing(self._hub):
            try:
                self._processes = self._pool.take(len(self._calls))
                for rank, process in enumerate(self._processes):
                    self._selector.register(process.control, selectors.EVENT_READ, rank)
                    process.send(self._calls[rank])
                until = deadline
                while not self._is_over() and (left := until - time.monotonic()) > 0:
                    was_open = played.case is None
                    self._wait(left)
                    if was_open and played.case is not None:
                        until = min(deadline, time.monotonic() + LAST_WORDS)
                if played.case is None:
                    played.late = {
                        rank: process.stacks(ask=True)
                        for rank, process in enumerate(self._processes)
                        if rank not in played.ends
                    }
                if len(played.ends) == len(self._calls) and all(end.returned for end in played.ends.values()):
                    self._pool.give_back(self._processes)
                    self._processes = []
            finally:
                for process in self._processes:
                    process.end()
        return played

    def _is_over(self) -> bool:
        played = self._played
        if played.case is not None and played.case.cause.rank in played.ends:
            return True
        return len(played.ends) == len(self._calls)

    def _wait(self, seconds: float) -> None:
        """Wait for what happens next, at most so long, and act on it."""
        due = self._hub.deadline()
        if due is not None:
            seconds = max(0.0, min(seconds, due - time.monotonic()))
        ready = [key for key, _ in self._selector.select(seconds)]
        for key in ready:  # before ends: a rank says goodbye before it ends
            if isinstance(key.data, SocketKey):
                self._hub.ready(key)
        for key in ready:
            if isinstance(key.data, int):
                self._end(key.data)
        if due is not None and time.monotonic() >= due:
            self._hub.tick()
        for event in self._hub.take():
            if isinstance(event, Verdict):
                self._played.case = event.diagnosis

    def _end(self, rank: int) -> None:
        """Take what a rank's process has to say; a fresh process takes the call over where this one cannot load it."""
        process = self._processes[rank]
        was_fresh = process.is_fresh
        self._selector.unregister(process.control)
        outcome = process.outcome()
        if outcome is not None and outcome.end == "unloadable" and not was_fresh:
            process.end()
            self._processes[rank] = fresh = WarmProcess()
            self._selector.register(fresh.control, selectors.EVENT_READ, rank)
            fresh.send(self._calls[rank])
            return
        if outcome is None:
            code, stacks = process.exit_code(), process.stacks(ask=False)
            self._played.ends[rank] = Ended(None, code, stacks)
            self._hub.worker_ended(WorkerExit(rank, 1 if code is None else code, stderr=stacks))
        else:
            self._played.ends[rank] = Ended(outcome)
            self._hub.worker_ended(WorkerExit(rank, 0 if outcome.end == "returned" else 1, stderr=outcome.text))
