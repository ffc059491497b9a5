"""`run_ranks`: call a function on several real ranks and give back what each returned.

Contract: the test's process calls; each rank is a process forked from a server that has imported torch already (tens of
milliseconds, not seconds), gets the environment that `allstep run` would give it, enters `allstep.init()` and calls
`fn(world, *args)`. Afterwards no rank's process is left, whatever happened. `fn` and its arguments are pickled, so `fn`
is a function at a module's top level. What can go wrong: a rank raises or dies (the first to do so is reported, the
others are ended), or the time limit passes (the ranks that did not finish are named).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from allstep.errors import RanksError
from allstep.launch.environment import worker_environment
from allstep.launch.port import ReservedPort

T = TypeVar("T")


def run_ranks(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> list[T]:
    """Call `fn(world, *args)` on `world_size` gloo ranks on this machine and return the results in rank order.

    Args:
        fn: a function at a module's top level.
        world_size: number of ranks, 1 or more.
        args: further arguments, pickled to each rank.
        timeout: seconds for the whole call.
        env: environment variables to set in every rank, over the ones of this process.

    Raises:
        RanksError: a rank raised, died, or did not finish in time. An exception of a rank is its `__cause__`.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it must be 1 or more")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["allstep.testing.preload"])
    processes: list[Any] = []
    pipes: dict[Connection, int] = {}
    with ReservedPort() as reserved:
        run_id = f"test-{uuid.uuid4().hex[:8]}"
        try:
            for rank in range(world_size):
                here, there = context.Pipe(duplex=False)
                variables = {"OMP_NUM_THREADS": "1", **(env or {})} | worker_environment(
                    rank=rank,
                    world_size=world_size,
                    local_rank=rank,
                    local_world_size=world_size,
                    master_addr="127.0.0.1",
                    master_port=reserved.port,
                    run_id=run_id,
                )
                process = context.Process(
                    target=_rank_main,
                    args=(there, variables, pickle.dumps((fn, args))),
                    daemon=True,
                    name=f"rank {rank}",
                )
                process.start()
                there.close()
                processes.append(process)
                pipes[here] = rank
            return _collect(processes, pipes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(processes: list[Any], pipes: dict[Connection, int], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(pipes)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RanksError(f"ranks {sorted(waiting.values())} of {len(processes)} did not finish in {timeout} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                succeeded, payload = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                raise RanksError(
                    f"rank {rank} of {len(processes)} died with exit code {processes[rank].exitcode}"
                ) from None
            if not succeeded:
                text, error = payload
                raise RanksError(f"rank {rank} of {len(processes)} raised:\n{text}") from error
            results[rank] = payload
    return [results[rank] for rank in range(len(processes))]


def _rank_main(pipe: Connection, variables: dict[str, str], call: bytes) -> None:
    os.environ.update(variables)
    try:
        import allstep

        fn, args = pickle.loads(call)
        with allstep.init() as world:
            result = fn(world, *args)
        message = pickle.dumps((True, result))
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        try:
            message = pickle.dumps((False, (text, error)))
            pickle.loads(message)
        except Exception:  # an exception that cannot be pickled still tells its text
            message = pickle.dumps((False, (text, None)))
    pipe.send_bytes(message)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
