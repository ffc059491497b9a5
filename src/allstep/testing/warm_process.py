"""A warm process: what runs in it, call after call.

Contract: forked from a server that has imported torch, it leads a session of its own, and the kernel ends it and what
it started when the process that owns the pool ends, however that ends (`lifeline`), also inside a collective. It takes
one `Call` after the other, in each enters `allstep.init()` and calls the function, and answers as `call` says. It ends
when nobody can call any more. `stacks` receives Python's stacks when it crashes or gets SIGQUIT.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import allstep
from allstep.launch.worker import tie_to_supervisor
from allstep.testing.baseline import Baseline
from allstep.testing.call import Call, Outcome, failure


def serve(control: Connection, lifeline: Connection, stacks: Any) -> None:
    """Serve calls until the other end of `control` is closed.

    Args:
        control: calls come and answers go here.
        lifeline: a pipe that nothing is ever sent through; its other end closes with the owner of the pool.
        stacks: a `DupFd` of the file for stacks.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tie_to_supervisor(os.getppid(), lifeline.fileno())
    file = stacks.detach()
    faulthandler.enable(file)
    faulthandler.register(signal.SIGQUIT, file)
    baseline = Baseline()
    while True:
        try:
            call: Call = pickle.loads(control.recv_bytes())
        except (EOFError, ConnectionResetError):
            os._exit(0)
        control.send_bytes(perform(call).to_bytes())
        sys.stdout.flush()
        sys.stderr.flush()
        control.send_bytes(baseline.restore().encode())


def perform(call: Call) -> Outcome:
    """Make the call."""
    os.environ.clear()
    os.environ.update(call.environment)
    os.chdir(call.folder)
    sys.path[:] = call.path
    try:
        fn, args = pickle.loads(call.function)
    except BaseException as error:
        return failure("unloadable", error)
    try:
        with allstep.init() as world:
            value = fn(world, *args)
    except BaseException as error:
        if error.__traceback__ is not None:
            error.__traceback__ = error.__traceback__.tb_next  # without this function's frame
        return failure("raised", error)
    return Outcome("returned", value)
