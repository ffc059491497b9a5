"""Writing the failure report to a standard error within a bounded time.

A rank, or the sidecar for it, writes the text to standard error, which may be a pipe that is read slowly or not at all.
"""

from __future__ import annotations

import contextlib
import os
import threading

from allstep.protocol.foreign_text import printable

WRITE_S = 1.0
"""Seconds that writing to a standard error may take."""


def write_bounded(descriptor: int, text: str, seconds: float = WRITE_S) -> bool:
    """Write text to a descriptor that others write to as well, for so many seconds at most.

    It cannot be made non-blocking, since that would hold for all who share it; so a thread writes. Nothing in the text
    acts on a terminal.

    Returns:
        Whether it is written, or being written slowly: then it is not to be written a second time.
    """
    done: list[bool] = []

    def write() -> None:
        left = printable(text, lines=True).encode(errors="replace")
        with contextlib.suppress(OSError):
            while left:
                left = left[os.write(descriptor, left) :]
            done.append(True)

    thread = threading.Thread(target=write, daemon=True, name="allstep report")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is ending, and starts no thread any more
        return False
    thread.join(seconds)
    return thread.is_alive() or bool(done)
