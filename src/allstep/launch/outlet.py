"""Standard output or error of the supervisor, written without ever making it wait.

Contract: `write` keeps what the reader (a pager, a slow terminal) has no room for; the supervisor's loop calls `flush`
when the descriptor is writable again, and stops reading its workers while `backlog` is large, so that a paused pager
pauses the output and not the watch over the workers. When the reader is gone, `closed` becomes true and what is written
afterwards is dropped: the run goes on.
"""

from __future__ import annotations

import os
import select

_PIECE = 512  # what a writable pipe takes without waiting, on every system (POSIX, PIPE_BUF)


class Outlet:
    """Buffered writing to a file descriptor that may be slow or go away."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.closed = False
        self._waiting = bytearray()

    @property
    def backlog(self) -> int:
        """Bytes that wait for the reader."""
        return len(self._waiting)

    def write(self, data: bytes) -> None:
        """Write what there is room for and keep the rest."""
        if not self.closed:
            self._waiting += data
            self.flush()

    def flush(self) -> None:
        """Write what there is room for now."""
        written = 0
        piece = max(_PIECE, getattr(select, "PIPE_BUF", _PIECE))
        try:
            while written < len(self._waiting) and select.select([], [self.fd], [], 0)[1]:
                written += os.write(self.fd, self._waiting[written : written + piece])
        except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
            pass
        except OSError:
            self.closed = True
            written = len(self._waiting)
        del self._waiting[:written]
