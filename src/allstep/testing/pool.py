"""The pool: warm processes of the process that calls `run_ranks`, kept from call to call.

Contract: `take` gives warm processes, started only where too few are idle; the caller sends each a `Call` and gives it
back when it has its `Outcome`, or retires it. A process that cannot put itself back in order is retired before anybody
gets it again. There is one pool in a process, made when first asked for and closed at the process's end; where the
owner is killed the kernel ends its processes. What can go wrong: a process cannot be started, which is an OSError; and
a forked child of the owner, which has neither its pool nor, in Python's multiprocessing, its server, is refused.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from multiprocessing.util import Finalize
from typing import Any

from allstep.errors import RanksError
from allstep.testing.call import Call, Outcome

_TIDY_S = 10.0
_STACKS_S = 1.0
_MOST_STACKS = 20_000


class WarmProcess:
    """One process of the pool as its owner holds it. `is_fresh` until its first call."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_preloaded())
        self.control, control = context.Pipe()
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.is_fresh = True
        self.process: Any = context.Process(
            target=_serve, args=(control, lifeline, DupFd(self._stacks.fileno())), name="allstep rank"
        )
        try:
            self.process.start()
        finally:
            control.close()
            lifeline.close()

    def send(self, call: Call) -> None:
        """Have it make a call; where it has just died, reading the outcome says so."""
        with contextlib.suppress(BrokenPipeError):
            self.control.send_bytes(pickle.dumps(call))

    def outcome(self) -> Outcome | None:
        """Read what became of the call, once `control` is readable; None where the process died."""
        try:
            data = self.control.recv_bytes()
        except (EOFError, ConnectionResetError):
            return None
        outcome: Outcome = pickle.loads(data)
        self.is_fresh = False
        return outcome

    def is_in_order(self) -> bool:
        """Wait, a while, until it has put itself back in order after its last call; false where it could not."""
        if self.is_fresh:
            return bool(self.process.is_alive())
        try:
            return bool(self.control.poll(_TIDY_S) and not self.control.recv_bytes())
        except (EOFError, ConnectionResetError):
            return False

    def exit_code(self) -> int | None:
        """How it ended, -N for signal N; None where that is not known in time."""
        self.process.join(_TIDY_S)
        code: int | None = self.process.exitcode
        return code

    def stacks(self, *, ask: bool) -> str:
        """What it wrote into its file for stacks: after a crash, or, if asked for, where its threads stand now."""
        before = os.fstat(self._stacks.fileno()).st_size
        if ask:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGQUIT)
            deadline = time.monotonic() + _STACKS_S
            while os.fstat(self._stacks.fileno()).st_size == before and time.monotonic() < deadline:
                time.sleep(0.01)  # faulthandler tells nobody when it has written
        written = os.pread(self._stacks.fileno(), _MOST_STACKS, before if ask else 0)
        return written.decode(errors="replace").strip()

    def end(self) -> None:
        """Kill it and what it started."""
        self._lifeline.close()
        self.process.kill()
        self.process.join()
        self.process.close()
        self.control.close()
        self._stacks.close()


class Pool:
    """Warm processes, idle and in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[WarmProcess] = []
        self._most = 0
        self._closed = False

    def take(self, count: int) -> list[WarmProcess]:
        """So many processes that are in order; those that are missing are started."""
        taken: list[WarmProcess] = []
        self._most = max(self._most, count)
        try:
            while len(taken) < count:
                with self._lock:
                    found = self._idle.pop(0) if self._idle else None
                if found is None:
                    taken.append(WarmProcess())
                elif found.is_in_order():
                    taken.append(found)
                else:
                    found.end()
        except BaseException:
            for process in taken:
                process.end()
            raise
        return taken

    def give_back(self, processes: list[WarmProcess]) -> None:
        """Keep processes whose outcome was read, as many as one call has taken."""
        with self._lock:
            room = 0 if self._closed else max(0, self._most - len(self._idle))
            self._idle[:0] = processes[:room]  # a next call then has the same, in the same places
        for process in processes[room:]:
            process.end()

    def close(self) -> None:
        """End all that are idle, and later those that are given back."""
        with self._lock:
            ending, self._idle, self._closed = self._idle, [], True
        for process in ending:
            process.end()


_pools: dict[int, Pool] = {}
_making = threading.Lock()


def own_pool() -> Pool:
    """The pool of this process.

    Raises:
        RanksError: this process was forked from one that has a pool.
    """
    with _making:
        pool = _pools.get(os.getpid())
        if pool is None and _pools:
            raise RanksError(
                "ranks cannot be started in a process forked from one that has started ranks already; start that "
                "process with multiprocessing's spawn method"
            )
        if pool is None:
            pool = _pools[os.getpid()] = Pool()
            # Before multiprocessing waits for processes that are not daemons, also in a process of its own making.
            Finalize(None, close_pool, exitpriority=100)
        return pool


def close_pool() -> None:
    """End this process's warm processes; the next call starts new ones."""
    with _making:
        pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        pool.close()


def _preloaded() -> list[str]:
    """What the server imports before it forks: torchmetrics only for those who use it, since it takes a second."""
    metrics = ["allstep.testing.preload_metrics"] if "torchmetrics" in sys.modules else []
    return ["allstep.testing.preload", *metrics]


def _serve(control: Connection, lifeline: Connection, stacks: Any) -> None:
    from allstep.testing.warm_process import serve  # imports torch, which the owner of the pool need not have

    serve(control, lifeline, stacks)
