"""The write end of a pipe that closes the moment this process begins to end, whatever ends it.

The kernel closes what a process has open after it has freed the process' memory, which takes milliseconds for each
gigabyte, and tells its parent right behind that. A service that learns of the end only then can be too late to say
anything: a scheduler ends it with the rank. So the pipe's end is held by a thread with a table of open files of its
own, which has nothing else in it. That thread has no memory to free, and is gone first.

The thread runs nothing but one read. Where the system does not give a thread a table of its own (before Linux 5.9, or
not Linux), the process holds the end as it holds any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading

_CLOSE_RANGE, _UNSHARE, _LAST = 436, 1 << 1, 0xFFFFFFFF  # of linux/close_range.h; the call has one number everywhere


class Lifeline:
    """Holds a descriptor for as long as this process lives, or until `release`.

    Args:
        fd: the write end of a pipe; this object's from now on.
    """

    def __init__(self, fd: int) -> None:
        waits, wake = os.pipe()
        # One of the two: the pipe's end itself, or that of another pipe by which the thread is woken.
        self._is_apart = _start(fd, waits)
        self._held = [wake] if self._is_apart else [fd]
        for each in {fd, waits, wake}.difference(self._held):
            os.close(each)
        # A forked child that outlives this process would hold the ends open.
        kept = self._held
        os.register_at_fork(after_in_child=lambda: _close_all(kept))

    def release(self) -> None:
        """Let go of it."""
        if self._held and self._is_apart:
            with contextlib.suppress(OSError):
                os.write(self._held[0], b"\n")  # a child of C code's may hold a copy, so closing is not enough
        _close_all(self._held)


def _start(fd: int, waits: int) -> bool:
    """Start the thread; return whether it holds the pipe's end."""
    apart: list[bool] = []
    begun = threading.Event()
    collects = gc.isenabled()
    gc.disable()  # finalizers that the thread happened to run would find no file open either
    try:
        threading.Thread(target=_hold, args=(fd, waits, apart, begun), daemon=True, name="allstep lifeline").start()
    except RuntimeError:  # there can be no more threads
        return False
    else:
        begun.wait()
    finally:
        if collects:
            gc.enable()
    return apart[0]


def _hold(fd: int, waits: int, apart: list[bool], begun: threading.Event) -> None:
    """The thread: it ends, and lets go of the pipe, when it is woken or the process ends."""
    # What debuggers and profilers run in each thread would find no file open.
    sys.settrace(None)
    sys.setprofile(None)
    is_apart = _keep_only(fd, waits)
    apart.append(is_apart)
    begun.set()
    if is_apart:
        os.read(waits, 1)


def _keep_only(*fds: int) -> bool:
    """Give this thread a table of open files of its own with nothing but these in it; return whether it has one."""
    if not sys.platform.startswith("linux"):
        return False
    call = ctypes.CDLL(None).syscall
    call.argtypes, call.restype = [ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint], ctypes.c_long
    first, second = sorted(fds)
    if call(_CLOSE_RANGE, second + 1, _LAST, _UNSHARE) != 0:
        return False
    if second > first + 1:
        call(_CLOSE_RANGE, first + 1, second - 1, 0)
    if first:
        call(_CLOSE_RANGE, 0, first - 1, 0)
    return True


def _close_all(fds: list[int]) -> None:
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())
