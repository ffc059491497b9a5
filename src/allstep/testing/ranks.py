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
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from allstep.errors import RanksError
from allstep.faults import FaultPlan
from allstep.launch.environment import worker_environment
from allstep.launch.port import ReservedPort
from allstep.testing.call import Call
from allstep.testing.pool import Pool, own_pool
from allstep.testing.round import play
from allstep.testing.verdict import Ended, first_failure

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
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **(env or {}),
        **(fault.to_environ() if fault is not None else {}),
    }
    function = pickle.dumps((fn, args))
    pool = Pool() if fresh else own_pool()
    with ReservedPort() as reserved:
        calls = _calls(variables, world_size, reserved.port, function)
        try:
            ends = play(calls, pool, timeout)
        finally:
            if fresh:
                pool.close()
    cause = first_failure(ends)
    if cause is None:
        by_rank = sorted(ends, key=lambda end: end.rank)
        return [end.outcome.value for end in by_rank if end.outcome is not None]
    if cause.is_late:
        raise RanksError(_unfinished(ends, world_size, timeout))
    raise RanksError(cause.describe(world_size)) from (cause.outcome.error if cause.outcome else None)


def _calls(variables: Mapping[str, str], world_size: int, port: int, function: bytes) -> list[Call]:
    run_id = f"test-{uuid.uuid4().hex[:8]}"
    places = [
        worker_environment(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            master_addr="127.0.0.1",
            master_port=port,
            run_id=run_id,
        )
        for rank in range(world_size)
    ]
    return [Call({**variables, **place}, os.getcwd(), tuple(sys.path), function) for place in places]


def _unfinished(ends: Sequence[Ended], world_size: int, timeout: float) -> str:
    late = sorted((end for end in ends if end.is_late), key=lambda end: end.rank)
    stacks = "".join(f"\nrank {end.rank} is at:\n{end.stacks}" for end in late if end.stacks)
    return f"ranks {[end.rank for end in late]} of {world_size} did not finish in {timeout} s{stacks}"
