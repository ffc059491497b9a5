"""`run_ranks`: call a function on several real ranks and give back what each returned.

The flow of one call, from top to bottom: pickle the function, describe each rank's process, have the warm server fork
them, serve their control channel until every rank has come to an end or the first cause of a failure is known, end the
processes, and return the results or raise.

Contract: the caller's process calls. Each rank is a new process, forked for this call, which has this process's
environment and what `allstep run` would add to it, enters `allstep.init()` and calls `fn(world, *args)`. No rank is
left when the call returns. `fn` and its arguments are pickled, so `fn` is a function at a module's top level, which
each rank imports with its present source.

What can go wrong: a rank raises or dies (the first cause is reported, and the ranks of that call are ended), or the
time limit passes (the ranks that did not finish are named, with where they stand).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.report import failure_text
from allstep.diagnosis.root_cause import Diagnosis
from allstep.errors import ArgumentError, RanksError
from allstep.faults import FaultPlan
from allstep.launch.environment import ReservedPort, worker_environment
from allstep.monitor.hub import Hub
from allstep.monitor.service import MonitorSettings, Verdict
from allstep.protocol.address import HERE, new_key
from allstep.protocol.server import SocketKey
from allstep.protocol.worker_exit import WorkerExit, signal_name
from allstep.testing.fork_server import ForkedRank, own_server
from allstep.testing.rank_process import Call, MainModule, Outcome

T = TypeVar("T")

LAST_WORDS = 1.0
"""Seconds that the rank of a known cause has to come to the end of its call, with its exception."""


def run_ranks(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    fault: FaultPlan | None = None,
    device: str | None = None,
) -> list[T]:
    """Call `fn(world, *args)` on `world_size` ranks on this machine and return the results in rank order.

    Args:
        fn: a function at a module's top level.
        world_size: number of ranks, 1 or more.
        args: further arguments, pickled to each rank.
        timeout: seconds for the whole call.
        env: environment variables to set in every rank, over the ones of this process.
        fault: what the ranks rehearse.
        device: where the ranks compute. By default on CUDA where this machine has a GPU for each of them, and else on
            the CPU. With "cuda" they share GPUs where there are fewer, over gloo.

    Raises:
        ArgumentError: `world_size` is less than 1.
        RanksError: a rank raised, died, or did not finish in time. An exception of a rank is its `__cause__`.
    """
    __tracebackhide__ = True
    if world_size < 1:
        raise ArgumentError(f"world_size is {world_size}; it must be 1 or more")
    given = {**(env or {}), **(fault.to_environ() if fault else {})}
    ended = _call_ranks(pickle.dumps((fn, args)), world_size, given, timeout, device)
    if len(ended.ranks) == world_size and all(end.returned for end in ended.ranks.values()):
        return [ended.ranks[rank].value for rank in range(world_size)]
    raise _error(ended, world_size, timeout) from ended.cause_error()


@dataclass(frozen=True, slots=True)
class RankEnd:
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

    @property
    def value(self) -> Any:
        """What the function returned."""
        return None if self.outcome is None else self.outcome.value

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
class CallEnd:
    """What became of a call. `ranks` has those that came to an end, `late` the stacks of those that did not in time.

    `diagnosis` is there where a rank failed before the time was over.
    """

    ranks: dict[int, RankEnd] = field(default_factory=dict)
    late: dict[int, str] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None

    def failed_rank(self) -> int | None:
        """The rank that failed first and has come to its end, where there is one."""
        failed = [rank for rank, end in self.ranks.items() if not end.returned]
        if self.diagnosis is None:
            return failed[0] if failed else None
        return self.diagnosis.cause.rank if self.diagnosis.cause.rank in failed else None

    def cause_error(self) -> BaseException | None:
        """What that rank raised."""
        rank = self.failed_rank()
        outcome = None if rank is None else self.ranks[rank].outcome
        return None if outcome is None else outcome.error


def _error(ended: CallEnd, world_size: int, timeout: float) -> RanksError:
    rank = ended.failed_rank()
    if rank is not None:
        return RanksError(f"rank {rank} of {world_size} {ended.ranks[rank].describe()}")
    if ended.diagnosis is not None:  # of a rank that returned or hangs: what the hub knows is all there is
        return RanksError(failure_text(ended.diagnosis).rstrip())
    stacks = "".join(f"\nrank {rank} is at:\n{text}" for rank, text in ended.late.items() if text)
    return RanksError(f"ranks {sorted(ended.late)} of {world_size} did not finish in {timeout} s{stacks}")


def _call_ranks(
    function: bytes, world_size: int, given: Mapping[str, str], timeout: float, device: str | None
) -> CallEnd:
    """Describe each rank's process as the launcher would, and make the call."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **given}
    key, run_id = new_key(), f"test-{uuid.uuid4().hex[:8]}"
    listener = socket.create_server(("127.0.0.1", 0))  # the hub's to close
    channel: dict[str, str] = {}
    if "ALLSTEP_CHANNEL" not in given:  # else the caller serves the ranks
        service = f"127.0.0.1:{listener.getsockname()[1]}" if world_size > 1 else ""
        channel = {"ALLSTEP_CHANNEL": service, "ALLSTEP_KEY": key}
    selector = selectors.DefaultSelector()
    limits = HangLimits.parse(variables.get("ALLSTEP_LIMITS", ""))
    hub = Hub(selector, listener, MonitorSettings(key, 0, world_size, limits))
    main = MainModule.of_this_process()
    with contextlib.closing(selector), contextlib.closing(hub), ReservedPort(HERE) as reserved:
        calls = []
        for rank in range(world_size):
            place = worker_environment(
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                local_world_size=world_size,
                master_addr="127.0.0.1",
                master_port=reserved.port,
                run_id=run_id,
            )
            environment = {**variables, **place, **channel}
            calls.append(Call(environment, os.getcwd(), tuple(sys.path), tuple(sys.argv), main, function, device))
        return _RunningCall(selector, hub, reserved.fileno()).run(calls, timeout)


class _RunningCall:
    """A call whose processes run. It drives the hub of their control channel as a supervisor does."""

    def __init__(self, selector: selectors.BaseSelector, hub: Hub, store: int) -> None:
        self._selector = selector
        self._hub = hub
        self._store = store
        self._processes: list[ForkedRank] = []
        self._ended = CallEnd()

    def run(self, calls: Sequence[Call], timeout: float) -> CallEnd:
        """Fork a process for each call and wait for what becomes of them.

        Args:
            calls: of each rank.
            timeout: seconds for the whole of it.
        """
        deadline = time.monotonic() + timeout
        server = own_server()
        try:
            for rank, call in enumerate(calls):
                process = ForkedRank(server, pickle.dumps(call), self._store)
                self._processes.append(process)
                self._selector.register(process.outcome, selectors.EVENT_READ, rank)
                self._selector.register(process.status, selectors.EVENT_READ, rank)
            self._wait_for_ends(deadline)
            if self._ended.diagnosis is None:
                for rank, process in enumerate(self._processes):
                    if rank not in self._ended.ranks:
                        self._ended.late[rank] = process.stacks(ask=True)
        finally:
            for process in self._processes:  # all of them first: each takes a moment to go
                process.kill()
            for process in self._processes:
                process.end()
        return self._ended

    def _wait_for_ends(self, deadline: float) -> None:
        """Wait until all have come to an end, or the cause of a failure is known.

        Then some ranks may stand in a collective that never comes to an end, so they are not waited for.
        """
        ended, until = self._ended, deadline
        while len(ended.ranks) < len(self._processes) and (left := until - time.monotonic()) > 0:
            was_open = ended.diagnosis is None
            self._wait(left)
            if ended.diagnosis is not None and ended.diagnosis.cause.rank in ended.ranks:
                return
            if was_open and ended.diagnosis is not None:
                until = min(deadline, time.monotonic() + LAST_WORDS)

    def _wait(self, seconds: float) -> None:
        """Wait for what happens next, at most so long, and act on it."""
        due = self._hub.deadline()
        seconds = max(0.0, min(seconds, due - time.monotonic()))
        ready = [key for key, _ in self._selector.select(seconds)]
        for key in ready:  # before ends: a rank says goodbye before it ends
            if isinstance(key.data, SocketKey):
                self._hub.ready(key)
        for rank in {key.data for key in ready if isinstance(key.data, int)}:
            self._take_end(rank)
        if time.monotonic() >= due:
            self._hub.tick()
        for event in self._hub.take():
            if isinstance(event, Verdict):
                self._ended.diagnosis = event.diagnosis

    def _take_end(self, rank: int) -> None:
        """Take what a rank wrote at its end, or how its process ended without that."""
        process = self._processes[rank]
        outcome: Outcome | None = None
        if process.outcome.poll():  # looked at first: a process that ended may have written just before
            with contextlib.suppress(EOFError):
                outcome = pickle.loads(process.outcome.recv_bytes())
        if outcome is None and not process.status.poll():
            self._selector.unregister(process.outcome)  # closed without a word; the status follows
            return
        for end in (process.outcome, process.status):
            with contextlib.suppress(KeyError):
                self._selector.unregister(end)
        if outcome is None:
            code, stacks = process.exit_code(), process.stacks(ask=False)
            self._ended.ranks[rank] = RankEnd(None, code, stacks)
            self._hub.worker_ended(WorkerExit(rank, 1 if code is None else code, stderr=stacks))
        else:
            self._ended.ranks[rank] = RankEnd(outcome)
            code = 0 if outcome.end == "returned" else 1
            self._hub.worker_ended(WorkerExit(rank, code, stderr=outcome.text))
