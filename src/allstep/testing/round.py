"""One call of `run_ranks` on warm processes: send each rank its part, wait for the outcomes, keep or end the processes.

Contract: `play` returns what became of each rank, as far as it waited for them, in the order in which it was learnt. If
all ranks returned, their processes go back to the pool; after any failure all of the call's processes are ended, for
some may stand in a collective that never comes to an end. After a failure that is most likely about another's, the
others have `SETTLE` seconds to tell the cause. A process that was used before and cannot load the function is replaced
by a fresh one, since what an earlier call imported may be in the way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from allstep.testing.call import Call
from allstep.testing.pool import Pool, WarmProcess
from allstep.testing.verdict import Ended, is_settled

SETTLE = 3.0
"""Seconds after a failure that is most likely about another's, in which that other may still tell."""


def play(calls: Sequence[Call], pool: Pool, timeout: float) -> list[Ended]:
    """Make the calls, one per rank.

    Args:
        calls: in rank order.
        pool: where processes come from and go back to.
        timeout: seconds for the whole round.
    """
    deadline = time.monotonic() + timeout
    processes = pool.take(len(calls))
    ends: list[Ended] = []
    try:
        for process, call in zip(processes, calls, strict=True):
            process.send(call)
        waiting: dict[Connection, int] = {process.control: rank for rank, process in enumerate(processes)}
        until = deadline
        while waiting and (ready := _readable(waiting, until)):
            for pipe in ready:
                rank = waiting.pop(pipe)
                if (end := _end_of(processes, rank, calls[rank])) is None:
                    waiting[processes[rank].control] = rank
                    continue
                ends.append(end)
                if end.failed:
                    until = min(until, time.monotonic() + SETTLE)
            if is_settled(ends):
                break
        if not any(end.failed for end in ends):
            ends += [_late(processes[rank], rank) for rank in waiting.values()]
        if not any(end.failed for end in ends):
            pool.give_back(processes)
            processes = []
    finally:
        for process in processes:
            process.end()
    return ends


def _readable(waiting: dict[Connection, int], until: float) -> list[Connection]:
    found = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
    return [pipe for pipe in found if isinstance(pipe, Connection)]


def _end_of(processes: list[WarmProcess], rank: int, call: Call) -> Ended | None:
    """The end of a rank whose process has something to say; None where a fresh process takes the call over."""
    process = processes[rank]
    was_fresh = process.is_fresh
    outcome = process.outcome()
    if outcome is None:
        return Ended(rank, exit_code=process.exit_code(), stacks=process.stacks(ask=False))
    if outcome.end == "unloadable" and not was_fresh:
        process.end()
        processes[rank] = WarmProcess()
        processes[rank].send(call)
        return None
    return Ended(rank, outcome)


def _late(process: WarmProcess, rank: int) -> Ended:
    return Ended(rank, stacks=process.stacks(ask=True), is_late=True)
