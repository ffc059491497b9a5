"""How a warm process was before its first call, so that each call finds it like that.

Contract: `Baseline` is made once, when everything that ranks share has been imported. After a call `restore` puts back
what can be put back: generators, torch's defaults, import path, streams, hooks, signals, and the modules that the call
imported from outside the installed packages, so that the next call imports them anew, with whatever their source then
is. It returns why the process cannot be used again, or "". Environment and current folder come with each call.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import linecache
import logging
import multiprocessing
import os
import random
import resource
import signal
import site
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from allstep import faults
from allstep.world import World

_THREADS_END_S = 1.0
_KEPT_SIGNALS = {signal.SIGKILL, signal.SIGSTOP}
_LIMITS = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]


class Baseline:
    """What to put back after a call."""

    def __init__(self) -> None:
        self._modules = set(sys.modules)
        self._threads = set(threading.enumerate())
        self._fixed = _fixed_facts()
        self._put_back = _changeable()
        self._handlers = {number: signal.getsignal(number) for number in signal.valid_signals() - _KEPT_SIGNALS}
        gc.collect()
        gc.freeze()

    def restore(self) -> str:
        """Put back what can be; return why the process cannot be used again, or ""."""
        if World.current() is not None:
            return "its World was left open"
        if dist.is_initialized():
            return "its process group was left"
        for put in self._put_back:
            put()
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        faults.forget()
        self._forget_modules()
        gc.collect()
        if threads := self._threads_left():
            return f"threads were left: {threads}"
        if _has_children():
            return "processes were left"
        return "" if _fixed_facts() == self._fixed else "its standard streams, limits or identity were changed"

    def _forget_modules(self) -> None:
        for name in set(sys.modules) - self._modules:
            if is_users_own(sys.modules[name]):
                parent, _, child = name.rpartition(".")
                del sys.modules[name]
                if parent in sys.modules:
                    vars(sys.modules[parent]).pop(child, None)
        linecache.clearcache()
        importlib.invalidate_caches()

    def _threads_left(self) -> list[str]:
        deadline = time.monotonic() + _THREADS_END_S
        extra = [thread for thread in threading.enumerate() if thread not in self._threads]
        for thread in extra:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in extra if thread.is_alive()]


def is_users_own(module: ModuleType) -> bool:
    """Whether the module is source of neither Python, an installed package, nor allstep."""
    if module.__name__.partition(".")[0] == "allstep":
        return False
    places = [file] if (file := getattr(module, "__file__", None)) else list(getattr(module, "__path__", []))
    return any(place.endswith(".py") or not file for place in places) and not any(
        place.startswith(_INSTALLED) for place in places
    )


_INSTALLED = tuple(
    {
        os.path.join(path, "")
        for path in (
            *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
            site.getusersitepackages(),
        )
    }
)


def _changeable() -> list[Callable[[], None]]:
    """What puts back each thing that has a value now."""

    def hold(get: Callable[[], Any], put: Callable[[Any], object]) -> Callable[[], None]:
        value = get()
        return lambda: (put(value), None)[1]

    def attribute(owner: Any, name: str) -> Callable[[], None]:
        return hold(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))

    def contents(owner: Any) -> Callable[[], None]:
        return hold(owner.copy, lambda value: owner.__setitem__(slice(None), value))

    def debug_deterministic(mode: int) -> None:
        if torch.get_deterministic_debug_mode() != mode:  # setting it takes a second, for what it imports
            torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)

    root = logging.getLogger()
    pairs: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.get_rng_state, torch.set_rng_state),
        (torch.get_default_dtype, torch.set_default_dtype),
        (lambda: None, torch.set_default_device),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.get_deterministic_debug_mode, debug_deterministic),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (
            lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []),
            lambda mask: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
        ),
        (lambda: None, lambda _: signal.alarm(0)),
        (sys.getrecursionlimit, sys.setrecursionlimit),
        (_umask, os.umask),
        (
            lambda: multiprocessing.get_start_method(allow_none=True),
            lambda name: multiprocessing.set_start_method(name, force=True),
        ),
        (lambda: root.level, root.setLevel),
        (lambda: root.manager.disable, logging.disable),
    ]
    if hasattr(os, "sched_getaffinity"):
        pairs.append((lambda: os.sched_getaffinity(0), lambda cores: os.sched_setaffinity(0, cores)))
    return [
        *(hold(get, put) for get, put in pairs),
        *(contents(each) for each in (sys.argv, sys.path, sys.meta_path, warnings.filters, root.handlers)),
        *(attribute(sys, name) for name in ("argv", "stdin", "stdout", "stderr", "excepthook", "unraisablehook")),
        attribute(threading, "excepthook"),
    ]


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _fixed_facts() -> tuple[Any, ...]:
    streams = []
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            stream = os.fstat(fd)
            streams.append((fd, stream.st_dev, stream.st_ino))
    limits = [resource.getrlimit(limit) for limit in _LIMITS]
    return streams, limits, os.getpid(), os.getsid(0), os.getpgrp(), os.getuid(), os.getgid()


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
