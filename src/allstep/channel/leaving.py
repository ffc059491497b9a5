"""Ending this process on order, from a thread, whatever the main thread is in."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_FLUSH_S = 0.3
_WRITE_S = 1.0


def leave(code: int, report: str) -> NoReturn:
    """Write what was printed so far and the report, each for a bounded time, and end the process at once.

    A pending collective cannot be aborted, and nothing of the interpreter's own ending may wait for it.
    """
    _bounded(_flush, _FLUSH_S)
    write_out(report)
    os._exit(code)


def write_out(report: str) -> None:
    """Write a report to standard error, whatever `sys.stderr` is by now; not for ever if nobody reads it."""
    if report:
        _bounded(lambda: _write(report.encode(errors="replace")), _WRITE_S)


def _bounded(action: Callable[[], None], seconds: float) -> None:
    thread = threading.Thread(target=action, daemon=True, name="allstep leaves")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is ending
        return
    thread.join(seconds)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]
