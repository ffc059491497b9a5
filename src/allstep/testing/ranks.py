"""`run_ranks`: call a function on several real ranks and give back what each returned.

Contract: the test's process calls; each rank is a warm process of the pool, gets this process's environment and what
`allstep run` would add to it, enters `allstep.init()` and calls `fn(world, *args)`. A call of as many ranks as an
earlier one starts no process. `fn` and its arguments are pickled, so `fn` is a function at a module's top level. What
can go wrong: a rank raises or dies (the first cause is reported, and the ranks of that call are ended), or the time
limit passes (the ranks that did not finish are named, with where they stand).
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.report import failure_text
from allstep.errors import RanksError
from allstep.faults import FaultPlan
from allstep.launch.environment import ReservedPort, worker_environment
from allstep.protocol.address import new_nonce
from allstep.testing.call import Call
from allstep.testing.pool import Pool, own_pool
from allstep.testing.round import Ended, Played, Round

T = TypeVar("T")


def run_ranks(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    fault: FaultPlan | None = None,
    fresh: bool = False,
) -> list[T]:
    """Call `fn(world, *args)` on `world_size` ranks on this machine and return the results in rank order.

    Args:
        fn: a function at a module's top level.
        world_size: number of ranks, 1 or more.
        args: further arguments, pickled to each rank.
        timeout: seconds for the whole call.
        env: environment variables to set in every rank, over the ones of this process.
        fault: what the ranks rehearse.
        fresh: run in new processes, and end them after; for a function that changes its process in a way that the
            pool cannot undo (it puts back environment, folder, generators, torch's defaults, signals, and imports the
            test's own modules anew; it replaces processes that leave threads, processes or an open World).

    Raises:
        RanksError: a rank raised, died, or did not finish in time. An exception of a rank is its `__cause__`.
    """
    __tracebackhide__ = True
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it must be 1 or more")
    given = {**(env or {}), **(fault.to_environ() if fault else {})}
    function = pickle.dumps((fn, args))
    pool = Pool() if fresh else own_pool()
    try:
        played = _play(function, world_size, given, pool, timeout)
    finally:
        if fresh:
            pool.close()
    ends = played.ends
    if all(rank in ends and ends[rank].returned for rank in range(world_size)):
        return [_value(ends[rank]) for rank in range(world_size)]
    failed = [rank for rank, end in ends.items() if not end.returned]
    if played.case is None and not failed:
        raise RanksError(_unfinished(played.late, world_size, timeout))
    rank = failed[0] if played.case is None else played.case.cause.rank
    if played.case is not None and rank not in failed:
        raise RanksError(failure_text(played.case).rstrip())
    outcome = ends[rank].outcome
    raise RanksError(f"rank {rank} of {world_size} {ends[rank].describe()}") from (
        outcome.error if outcome is not None else None
    )


def _play(function: bytes, world_size: int, given: Mapping[str, str], pool: Pool, timeout: float) -> Played:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **given}
    limits = HangLimits.parse(variables.get("ALLSTEP_LIMITS", ""))
    nonce, run_id = new_nonce(), f"test-{uuid.uuid4().hex[:8]}"
    listener = socket.create_server(("127.0.0.1", 0))  # the round's to close
    channel: dict[str, str] = {}
    if "ALLSTEP_CHANNEL" not in given:  # else the caller serves the ranks
        service = f"127.0.0.1:{listener.getsockname()[1]}" if world_size > 1 else ""
        channel = {"ALLSTEP_CHANNEL": service, "ALLSTEP_NONCE": nonce}
    with ReservedPort() as reserved:
        places = [
            worker_environment(
                rank=rank,
                world_size=world_size,
                local_rank=rank,
                local_world_size=world_size,
                master_addr="127.0.0.1",
                master_port=reserved.port,
                run_id=run_id,
            )
            for rank in range(world_size)
        ]
        calls = [Call({**variables, **place, **channel}, os.getcwd(), tuple(sys.path), function) for place in places]
        return Round(calls, pool, listener, nonce, limits).play(timeout)


def _value(end: Ended) -> Any:
    assert end.outcome is not None
    return end.outcome.value


def _unfinished(late: Mapping[int, str], world_size: int, timeout: float) -> str:
    stacks = "".join(f"\nrank {rank} is at:\n{text}" for rank, text in late.items() if text)
    return f"ranks {sorted(late)} of {world_size} did not finish in {timeout} s{stacks}"
