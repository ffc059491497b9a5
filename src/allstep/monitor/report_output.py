"""Writing the failure report: to a standard error within a bounded time, and to a file that is whole or not there.

The launcher's head and each sidecar write one `failure.json` per attempt that failed. The machine may go down at any
moment of that, since something has just failed on it. A rank, or the sidecar for it, writes the text to standard error,
which may be a pipe that is read slowly or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from allstep.protocol.foreign_text import printable

WRITE_S = 1.0
"""Seconds that writing to a standard error may take."""


def write_report(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON so that a reader finds the whole of it or nothing. Only this user may read it.

    Raises:
        OSError: the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(temporary, "x", encoding="utf-8", opener=open_private) as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open`: a file that it makes is readable by this user alone."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


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
