"""The stacks of this process: on request, and from a timer that needs no interpreter lock.

`faulthandler` has one such timer in a process. While a rank has a stacks file, the timer is its.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
from typing import IO

from allstep.channel.stacks import without_current_thread

WITHOUT_BEAT_S = 2.0
"""Seconds without a heartbeat after which the stacks are written to the file."""

_LARGEST = 256 << 10


def own_stacks() -> str:
    """The stacks of all threads but the one that asks."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return without_current_thread(file.read(_LARGEST).decode(errors="replace"))


class StacksTimer:
    """Writes the stacks of all threads to a file when `wind_up` was not called for `WITHOUT_BEAT_S`."""

    def __init__(self, path: str) -> None:
        """Open the file; an empty path, or a file that cannot be written, makes a timer that does nothing."""
        self._file: IO[bytes] | None = None
        if path:
            with contextlib.suppress(OSError):
                self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed in close

    def wind_up(self) -> None:
        """Begin to count again, and forget stacks of a time that is over."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            if os.fstat(self._file.fileno()).st_size:
                self._file.truncate(0)
                self._file.seek(0)
        faulthandler.dump_traceback_later(WITHOUT_BEAT_S, repeat=False, file=self._file)

    def close(self) -> None:
        """Stop counting."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None
