"""A socket that carries lines, for the few short messages that supervisors exchange before an attempt.

Contract: never waits. `receive` gives the whole lines that have come, and raises ConnectionError when the other side is
gone or sends a line that is too long; `send` raises ConnectionError where the line does not fit into what the kernel
takes at once, which for lines this short means that the other side is stuck.
"""

from __future__ import annotations

import contextlib
import socket

from allstep.launch.joining import LONGEST, Message, encode


class Wire:
    """One connection between two supervisors."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._unread = b""

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send a message."""
        line = encode(message)
        try:
            if self._socket.send(line) != len(line):
                raise ConnectionError("the other side does not read")
        except BlockingIOError as error:
            raise ConnectionError("the other side does not read") from error
        except OSError as error:
            raise ConnectionError(str(error)) from error

    def receive(self) -> list[bytes]:
        """Return the lines that have come, without their ends."""
        try:
            data = self._socket.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ConnectionError(str(error)) from error
        if not data:
            raise ConnectionError("closed")
        *lines, self._unread = (self._unread + data).split(b"\n")
        if len(self._unread) > LONGEST:
            raise ConnectionError("a line without an end")
        return lines

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()
