"""One non-blocking socket that carries lines.

Contract: `receive` gives the whole lines that have come, `send` takes bytes and passes on what the peer has room for;
the rest waits in `backlog` for `flush`. Neither blocks and neither raises: once the connection is over, `ended` says
why. Lines, and what waits for a slow reader, are bounded.
"""

from __future__ import annotations

import contextlib
import socket

LONGEST_LINE = 4 << 20
"""Bytes of a line, at most: the stacks of a rank with many threads take some tens of thousands."""

LARGEST_BACKLOG = 16 << 20
"""Bytes that wait for a peer that does not read, at most; then it is let go."""

_CHUNK = 1 << 16
_CHUNKS = 16  # read at a time, so that one busy peer does not keep the others waiting


class Connection:
    """A connected socket; owned by this object from now on."""

    def __init__(self, sock: socket.socket, longest: int = LONGEST_LINE) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.longest = longest
        self.ended = ""
        self._in = bytearray()
        self._out = bytearray()

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._out)

    def receive(self) -> list[bytes]:
        """The lines that have come, without their ends."""
        for _ in range(_CHUNKS):
            try:
                data = self.sock.recv(_CHUNK)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._end(error.strerror or str(error))
                break
            if not data:
                self._end("closed by the other side")
                break
            self._in += data
            if len(data) < _CHUNK:
                break
        return self._lines()

    def send(self, data: bytes) -> None:
        """Send, now or when there is room."""
        if self.ended:
            return
        self._out += data
        self.flush()
        if len(self._out) > LARGEST_BACKLOG:
            self._end(f"the other side does not read: {len(self._out)} bytes wait for it")

    def flush(self) -> None:
        """Send what waits, as far as there is room."""
        while self._out and not self.ended:
            try:
                sent = self.sock.send(self._out[:_CHUNK])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._end(error.strerror or str(error))
                return
            del self._out[:sent]

    def close(self) -> None:
        """Close the socket."""
        self._end("closed")
        self.sock.close()

    def _lines(self) -> list[bytes]:
        *lines, rest = self._in.split(b"\n")
        if max(map(len, (*lines, rest))) > self.longest:
            self._end(f"it sent a line of more than {self.longest} bytes")
            self._in.clear()
            return []
        self._in = rest
        return [bytes(line) for line in lines if line]

    def _end(self, why: str) -> None:
        self.ended = self.ended or why
