"""What runs in a rank's process: one call, in a process that was forked for it and has never run anything.

Contract: forked from a server that has imported torch, the process leads a session of its own. The kernel ends it and
what it started when its lifeline closes, also inside a collective. It takes on the caller's environment, folder,
arguments and import path, enters `allstep.init()`, calls the function, writes one `Outcome` and ends without taking
Python apart. Its standard streams are the caller's.

What can go wrong: the function cannot be unpickled, or raises; both are outcomes. Where the process crashes or gets
SIGQUIT, the stacks of its threads go to the file for stacks.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

from allstep.launch.worker import serve_store_on, tie_to_supervisor


@dataclass(frozen=True, slots=True)
class MainModule:
    """What the caller runs as `__main__`: a module by name or a script by path; both empty where it is neither."""

    name: str = ""
    path: str = ""

    @classmethod
    def of_this_process(cls) -> MainModule:
        """That of the process that asks."""
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        if spec is not None:
            return cls(name=spec.name)
        path = getattr(main, "__file__", None)
        return cls(path=str(Path(path).absolute())) if path else cls()


@dataclass(frozen=True, slots=True)
class Call:
    """One rank's part of a call: what the process takes on from its caller, and the pickled function with arguments."""

    environment: Mapping[str, str]
    folder: str
    path: tuple[str, ...]
    arguments: tuple[str, ...]
    main: MainModule
    function: bytes
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call. `value` is what the function returned, `text` the traceback of what it raised.

    "unloadable": the function could not be unpickled, and nothing was called.
    """

    end: Literal["returned", "raised", "unloadable"]
    value: Any = None
    text: str = ""
    error: BaseException | None = None

    @classmethod
    def of_error(cls, end: Literal["raised", "unloadable"], error: BaseException) -> Outcome:
        """The outcome of a call that raised."""
        return cls(end, text="".join(traceback.format_exception(error)), error=error)

    def to_bytes(self) -> bytes:
        """Pickled. An exception that does not survive that is left out; a result that does not is an error."""
        try:
            message = pickle.dumps(self)
            pickle.loads(message)  # an exception may be pickled and fail only when it is made again
        except BaseException as problem:
            if self.end == "returned":
                return Outcome.of_error("raised", problem).to_bytes()
            return pickle.dumps(Outcome(self.end, text=self.text))
        return message


def run_call(call: bytes, server: int, outcome: Connection, lifeline: int, stacks: int, store: int) -> NoReturn:
    """Be a rank for one call.

    Args:
        call: a pickled `Call`.
        server: pid of the process that this one was forked from.
        outcome: where the `Outcome` goes.
        lifeline: a pipe that nothing is ever sent through; its other end closes with the caller.
        stacks: descriptor of the file for stacks.
        store: the socket at the port where the ranks' store is to be, which rank 0 serves it on.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tie_to_supervisor(server, lifeline)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGQUIT, stacks)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # started processes draw different numbers; forked ones would draw the same
    message = perform(pickle.loads(call), store).to_bytes()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    outcome.send_bytes(message)
    os._exit(0)


def perform(call: Call, store: int) -> Outcome:
    """Make the call."""
    os.environ.clear()
    os.environ.update(call.environment)
    if os.environ.get("RANK") == "0":
        serve_store_on(store)
    else:
        os.close(store)
    os.chdir(call.folder)
    sys.path[:] = call.path
    sys.argv[:] = call.arguments
    import allstep

    try:
        if b"__main__" in call.function:
            _import_main(call.main)
        fn, args = pickle.loads(call.function)
    except BaseException as error:
        return Outcome.of_error("unloadable", error)
    try:
        with allstep.init(**device_options(call.device, os.environ)) as world:
            value = fn(world, *args)
    except BaseException as error:
        if error.__traceback__ is not None:
            error.__traceback__ = error.__traceback__.tb_next  # without this function's frame
        return Outcome.of_error("raised", error)
    return Outcome("returned", value)


def device_options(
    asked: str | None, environ: Mapping[str, str], count: Callable[[], int] | None = None
) -> dict[str, Any]:
    """What `allstep.init` is given for the device of a rank of a test.

    Args:
        asked: a device; None is CUDA where this machine has a GPU for each rank, and else the CPU.
        environ: the rank's place in it.
        count: gives the number of GPUs; by default CUDA does.
    """
    if asked is not None and asked != "cuda":
        return {"device": asked}
    from allstep.cuda import device_count

    rank, ranks = int(environ["LOCAL_RANK"]), int(environ["LOCAL_WORLD_SIZE"])
    gpus = (device_count if count is None else count)()
    if asked is None:
        return {} if gpus >= ranks else {"device": "cpu"}
    # Ranks that share a GPU meet over gloo: nccl takes one rank per device.
    return {"device": f"cuda:{rank % gpus}", "backend": "gloo"} if 0 < gpus < ranks else {"device": "cuda"}


def _import_main(main: MainModule) -> None:
    """Have the caller's script as `__main__`, run under the name that multiprocessing gives it in its processes.

    What a script does only `if __name__ == "__main__"` is not done again, and both names lead to its functions.
    """
    module = ModuleType("__mp_main__")
    if main.name:
        vars(module).update(runpy.run_module(main.name, run_name="__mp_main__", alter_sys=True))
    elif main.path:
        vars(module).update(runpy.run_path(main.path, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
