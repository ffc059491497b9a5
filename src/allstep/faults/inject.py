"""Where faults meet a running rank: it asks at a few points whether a fault strikes, and this carries it out.

Contract: `allstep.init`, `World.close` and an engine's run call `strike`, the last of them only where there is a plan
(`active`). The plan is read from ALLSTEP_FAULT each time, so that nothing is kept but which faults have struck in this
process; `forget` lets them strike again. A fault says on standard error that it strikes, for whoever reads the log
later. `carry_out` does what one fault says, and gives back the batch for the step, which only `nan` changes; what
`flip` says the engine does, which knows the model. Many kinds do not return.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from allstep.errors import ConfigurationError
from allstep.faults.fault import KINDS, Fault, FlippedBit, Raised, RankPosition
from allstep.faults.plan import VARIABLE, FaultPlan, write_fault

_CHUNK = 16 * 2**20  # bytes
_MOST_FREE = 2**30  # bytes

FILLER = "filled-by-a-rehearsed-fault"
"""The file that fills a disk."""


_struck: set[Fault] = set()  # per process: a restarted rank rehearses anew, unless its plan names the attempt


def active() -> bool:
    """Whether there is a plan."""
    return bool(os.environ.get(VARIABLE))


def strike(position: RankPosition, batch: Any = None, *, flip: Callable[[FlippedBit], object] | None = None) -> Any:
    """Carry out what the plan has for this place; gives back the batch to go on with.

    Args:
        position: the place.
        batch: of the step.
        flip: flips a bit of a parameter; given in an engine's run.

    Raises:
        ConfigurationError: the plan cannot be read or carried out.
        BaseException: what the plan says.
    """
    if not active():
        return batch
    for fault in FaultPlan.from_environ(os.environ).faults:
        if fault not in _struck and fault.strikes(position):
            if not KINDS[fault.kind].repeats:
                _struck.add(fault)
                _announce(fault, position)
            batch = carry_out(fault, batch, flip)
    return batch


def forget() -> None:
    """Let every fault strike again."""
    _struck.clear()


def _announce(fault: Fault, position: RankPosition) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"allstep: a rehearsed fault strikes {position}: {write_fault(fault)}\n".encode())


class LeftEarly(GeneratorExit):
    """Ends an engine's run on this rank without a word; its run returns."""


def carry_out(fault: Fault, batch: Any, flip: Callable[[FlippedBit], object] | None = None) -> Any:
    """Do what the fault says; gives back the batch to go on with, where the process goes on."""
    argument = fault.argument
    match fault.kind:
        case "raise":
            raise _made(argument)
        case "kill":
            os.kill(os.getpid(), argument)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hold_gil":
            _sleep_with_lock(argument)
        case "sleep" | "slow":
            time.sleep(argument)  # the fault itself
        case "exit":
            sys.exit(argument)
        case "leave":
            raise LeftEarly
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "fill_disk":
            _fill(Path(argument))
        case "allocate":
            _allocate(argument)
        case "ignore":
            signal.signal(argument, signal.SIG_IGN)
        case "nan":
            return _poisoned(batch)
        case "flip" if flip is not None:
            flip(argument)
    return batch


def _made(raised: Raised) -> BaseException:
    module, _, name = raised.type.rpartition(".")
    try:
        found = getattr(import_module(module or "builtins"), name)
        error = found(*([raised.message] if raised.message else []))
    except Exception as problem:
        raise ConfigurationError(f"the fault raises {raised.type}, which cannot be made here: {problem}") from problem
    if not isinstance(error, BaseException):
        raise ConfigurationError(f"the fault raises {raised.type}, which is no exception")
    return error


def _sleep_with_lock(seconds: float) -> None:
    # PyDLL, unlike CDLL, keeps the interpreter lock during a call.
    libc, end = ctypes.PyDLL(None), time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        libc.usleep(min(int(left * 1e6) + 1, 10**9))  # a signal cuts it short


def _fill(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free > _MOST_FREE:
        raise ConfigurationError(
            f"the fault fills {folder}, where {free / 2**30:.1f} GiB are free: more than the 1 GiB that it may fill, "
            "in case it is somebody's disk; use a small tmpfs or a disk with a quota"
        )
    with open(folder / FILLER, "ab", buffering=0) as file:
        for size in (_CHUNK, 4096, 1):  # ever smaller, until not a byte is free
            with contextlib.suppress(OSError):
                while file.write(b"\1" * size):
                    pass


def _allocate(size: int) -> None:
    # Written to, since the kernel gives memory only when it is touched.
    held = [b"\1" * min(_CHUNK, size - start) for start in range(0, size, _CHUNK)]
    del held


def _poisoned(batch: Any) -> Any:
    poisoned, count = _with_nan(batch)
    if not count:
        raise ConfigurationError("the fault makes a batch NaN, but this one has no floating-point number or tensor")
    return poisoned


def _with_nan(value: Any) -> tuple[Any, int]:
    """The value with its floating-point parts NaN, and how many those are."""
    if isinstance(value, float) or (hasattr(value, "is_floating_point") and value.is_floating_point()):
        return value * float("nan"), 1
    if isinstance(value, Mapping):
        pairs = {key: _with_nan(each) for key, each in value.items()}
        return {key: each for key, (each, _) in pairs.items()}, sum(count for _, count in pairs.values())
    if isinstance(value, list | tuple):
        parts = [_with_nan(each) for each in value]
        values = [each for each, _ in parts]
        made = type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
        return made, sum(count for _, count in parts)
    return value, 0
