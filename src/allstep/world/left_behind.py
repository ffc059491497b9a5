"""Threads that are left waiting in native code, and the end of the interpreter.

Contract: who gives up on a call that it had a daemon thread make (a store that does not answer, a save that does not
end) says so with `leave_behind`. The process then ends with its own exit status, whatever becomes of the call.

What would go wrong: a call that comes back while the interpreter ends, because its peer is just being closed, asks for
Python's lock. Until Python 3.14 the thread is then unwound by force, through frames of C++ that must not be, and the
runtime aborts the process: status 134 in place of the script's. So the thread is held where C++ would abort.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading

_left: list[threading.Thread] = []


def leave_behind(thread: threading.Thread) -> None:
    """Take note of a daemon thread that waits in native code and may do so for ever."""
    if not _left:
        atexit.register(_hold_what_is_left)
    _left.append(thread)


def _hold_what_is_left() -> None:
    if not any(thread.is_alive() for thread in _left) or not sys.platform.startswith("linux"):
        return
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        pause = ctypes.CDLL(None).pause
    except (OSError, AttributeError):  # another C++ runtime: the exit status may be that of an abort
        return
    set_terminate(ctypes.cast(pause, ctypes.c_void_p))
