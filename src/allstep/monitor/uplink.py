"""A relay's connection to the head: made without blocking, and given up only for a reason.

Contract: driven by the relay: `ready` for its socket, `tick` at the latest at `deadline`. `send` takes encoded messages
before the connection stands, too. `take` gives the lines that came. Once the head could not be reached in `CONNECT_S`
at any of the addresses that its name has, closed the connection, or was silent for longer than `link`, `lost` says how,
and the uplink is closed. Each end says something once a second, so silence means that the other end, or the network, is
gone.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
from typing import Any

from allstep.diagnosis.hang_detector import Watch
from allstep.protocol.connection import Connection
from allstep.protocol.messages import NodeBeat, NodeHello, encode
from allstep.protocol.server import HubKey, Owner

CONNECT_S = 30.0
"""Seconds in which the head must be reached."""

ADDRESS_S = 5.0
"""Seconds that one of several addresses has to answer, before the next is tried."""

_PERIOD = 1.0
_COLLECT_S = 0.1
_RETRY_S = 0.5


class Uplink:
    """The connection to the head, from before it stands until it is lost."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        owner: Owner,
        head: tuple[str, int],
        hello: NodeHello,
        *,
        link: float,
        watch: Watch,
    ) -> None:
        """Begin to connect.

        Raises:
            OSError: the head's name does not resolve.
        """
        self.lost = ""
        self._selector = selector
        self._owner = owner
        self._hello = hello
        self._link = link
        self._watch = watch
        self._addresses: list[tuple[int, tuple[Any, ...]]] = [
            (found[0], found[4]) for found in socket.getaddrinfo(*head, type=socket.SOCK_STREAM)
        ]
        self._tried = 0
        self._connecting: socket.socket | None = None
        self._up: Connection | None = None
        self._outgoing: list[bytes] = []
        self._lines: list[bytes] = []
        now = watch.now()
        self._heard = now
        self._connect_by = now + CONNECT_S
        self._connect_at: float | None = None
        self._next_at: float | None = None
        self._send_at: float | None = None
        self._tick_at = now + _PERIOD
        self._connect()

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return (self._up.backlog if self._up else 0) + sum(map(len, self._outgoing))

    def owns(self, fileobj: object) -> bool:
        """Whether a ready socket is this connection's."""
        return fileobj is self._connecting or (self._up is not None and fileobj is self._up.sock)

    def ready(self) -> None:
        """Act on the socket."""
        if self._connecting is not None:
            self._connected(self._connecting)
        elif self._up is not None:
            self._up.flush()
            lines = self._up.receive()
            if lines:
                self._heard = self._watch.now()
                self._lines += lines
            self._settle()

    def deadline(self) -> float:
        """When `tick` is due."""
        return min(at for at in (self._connect_at, self._next_at, self._send_at, self._tick_at) if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        now = self._watch.now()
        if self._connect_at is not None and now >= self._connect_at:
            self._connect()
        if self._next_at is not None and now >= self._next_at:
            self._try_another("it does not answer")
        if now >= self._tick_at:
            self._tick_at = now + _PERIOD
            self._check(now)
            self.send(encode(NodeBeat()), at_once=True)
        if self._send_at is not None and now >= self._send_at:
            self.flush()

    def take(self) -> list[bytes]:
        """The lines that came since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def send(self, line: bytes, *, at_once: bool) -> None:
        """Send an encoded message, or collect it with others for a moment."""
        if self.lost:
            return
        self._outgoing.append(line)
        if at_once:
            self.flush()
        elif self._send_at is None:
            self._send_at = self._watch.now() + _COLLECT_S

    def flush(self) -> None:
        """Send what was collected, as far as the connection stands."""
        self._send_at = None
        if self._up is not None and self._outgoing:
            lines, self._outgoing = b"".join(self._outgoing), []
            self._up.send(lines)
            self._settle()

    def give_up(self, how: str) -> None:
        """Close, and say how the head was lost."""
        self.lost = self.lost or how
        self.close()

    def close(self) -> None:
        """Let go of the socket."""
        for sock in (self._connecting, self._up.sock if self._up else None):
            if sock is not None:
                self._selector.unregister(sock)
                sock.close()
        self._up = self._connecting = self._connect_at = self._next_at = None

    def _connect(self) -> None:
        self._connect_at = None
        family, address = self._addresses[self._tried % len(self._addresses)]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        error = sock.connect_ex(address)
        if error in (0, errno.EINPROGRESS):
            self._connecting = sock
            self._selector.register(sock, selectors.EVENT_WRITE, HubKey(self._owner))
            self._next_at = self._watch.now() + ADDRESS_S if len(self._addresses) > 1 else None
        else:
            sock.close()
            self._retry(os.strerror(error))

    def _try_another(self, why: str) -> None:
        """Give up a connection that is not coming about."""
        if self._connecting is not None:
            self._selector.unregister(self._connecting)
            self._connecting.close()
        self._connecting = None
        self._retry(why)

    def _connected(self, sock: socket.socket) -> None:
        self._connecting = self._next_at = None
        self._selector.unregister(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            sock.close()
            self._retry(os.strerror(error))
            return
        self._up, self._heard = Connection(sock), self._watch.now()
        self._selector.register(sock, selectors.EVENT_READ, HubKey(self._owner))
        self._up.send(encode(self._hello))
        self._settle()
        self.flush()

    def _retry(self, why: str) -> None:
        """Go on to the next address, at once, or in a moment where all have been tried."""
        now = self._watch.now()
        self._next_at = None
        self._tried += 1
        if now < self._connect_by:
            self._connect_at = now + (_RETRY_S if self._tried % len(self._addresses) == 0 else 0.0)
        else:
            self.give_up(f"could not be reached within {CONNECT_S:g} s ({why})")

    def _check(self, now: float) -> None:
        if self._up is not None and (silence := self._watch.age(self._heard)) > self._link:
            self.give_up(f"was not heard from for {silence:.0f} s")
        elif self._connecting is not None and now > self._connect_by:
            self.give_up(f"could not be reached within {CONNECT_S:g} s")

    def _settle(self) -> None:
        if self._up is None:
            return
        if self._up.ended:
            self.give_up(f"closed the connection ({self._up.ended})")
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._up.backlog else 0)
        if self._selector.get_key(self._up.sock).events != events:
            self._selector.modify(self._up.sock, events, HubKey(self._owner))
