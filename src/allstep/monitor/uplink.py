"""A relay's connection to the head's hub: made without blocking, and given up only for a reason.

The relay drives it: `ready` for its socket, `tick` at the latest at `deadline`. `send` takes encoded messages before
the connection stands, too. `take` gives the lines that came. `lost` says how the head was lost, and the uplink is then
closed: the head could not be reached within `CONNECT_S` at any address of its name, did not prove itself, closed the
connection (`head_ended`), or was silent for longer than `link`. Each end sends something once a second, so silence
means that the other end, or the network, is gone.
"""

from __future__ import annotations

import selectors
import socket

from allstep.monitor.driven_clock import DrivenClock
from allstep.protocol.connection import Connection, Connector
from allstep.protocol.messages import NodeHeartbeat, NodeHello, encode
from allstep.protocol.server import SocketKey, SocketOwner

CONNECT_S = 30.0
"""Seconds in which the head must be reached."""

ANSWER_S = 5.0
"""Seconds that one of the head's addresses has to answer before the next is tried."""

_PERIOD = 1.0  # between two heartbeats
_COLLECT_S = 0.1  # for which heartbeats of ranks wait for others, to be sent with them


class Uplink:
    """The connection to the head, from before it stands until it is lost."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        owner: SocketOwner,
        head: tuple[str, int],
        hello: NodeHello,
        *,
        key: str,
        link: float,
        clock: DrivenClock,
    ) -> None:
        """Begin to connect.

        Args:
            selector: the driver's.
            owner: whom the socket, once ready, is given to.
            head: the host and port of the hub.
            hello: how this node introduces itself.
            key: what the head has to have.
            link: seconds of silence after which the head is lost.
            clock: the relay's.
        """
        self.lost = ""
        self.head_ended = False
        self._selector = selector
        self._owner = owner
        self._hello = hello
        self._link = link
        self._clock = clock
        self._connector = Connector(
            [head],
            key=key,
            within=CONNECT_S,
            answer=ANSWER_S,
            proof=CONNECT_S,  # its loop may be busy with thousands of others
            clock=clock.now,
        )
        self._connection: Connection | None = None
        self._watched: socket.socket | None = None
        self._outgoing: list[bytes] = []
        self._lines: list[bytes] = []
        self._heard = clock.now()
        self._send_at: float | None = None
        self._tick_at = clock.now() + _PERIOD
        self._connect()

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return (self._connection.backlog if self._connection else 0) + sum(map(len, self._outgoing))

    def owns(self, fileobj: object) -> bool:
        """Whether a ready socket is this connection's."""
        return fileobj is self._watched

    def ready(self) -> None:
        """Act on the socket."""
        if self._connection is None:
            self._connect()
            return
        self._connection.flush()
        lines = list(self._connection.receive())
        if lines:  # any line shows that the head is there
            self._heard = self._clock.now()
            self._lines += lines
        self._update()

    def deadline(self) -> float:
        """When `tick` is due."""
        connecting = None if self._connection or self.lost else self._connector.deadline()
        return min(at for at in (connecting, self._send_at, self._tick_at) if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        now = self._clock.now()
        if self._connection is None and not self.lost and now >= self._connector.deadline():
            self._connect()
        if now >= self._tick_at:
            self._tick_at = now + _PERIOD
            if self._connection is not None and (silence := self._clock.age(self._heard)) > self._link:
                self.give_up(f"was not heard from for {silence:.0f} s")
            self.send(encode(NodeHeartbeat()), at_once=True)
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
            self._send_at = self._clock.now() + _COLLECT_S

    def flush(self) -> None:
        """Send what was collected, as far as the connection stands."""
        self._send_at = None
        if self._connection is not None and self._outgoing:
            lines, self._outgoing = b"".join(self._outgoing), []
            self._connection.send(lines)
            self._update()

    def give_up(self, how: str) -> None:
        """Close, and keep how the head was lost; the first reason counts."""
        self.lost = self.lost or how
        self.close()

    def close(self) -> None:
        """Let go of the socket."""
        self._watch(None)
        self._connector.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> None:
        """Go on connecting, and introduce this node once the connection stands."""
        connector = self._connector
        # Each attempt has a socket of its own, which may take the number of the last one's: it is let go of first.
        self._watch(None)
        connector.advance()
        if connector.failed:
            self.give_up(f"could not be reached within {CONNECT_S:g} s ({connector.failed})")
        elif connector.connection is None:
            self._watch(connector.sock, connector.events)
        else:
            self._connection, self._heard = connector.connection, self._clock.now()
            self._connection.send(encode(self._hello))
            self._update()
            self.flush()

    def _update(self) -> None:
        """Notice the end of the connection; else watch for room to write exactly while something waits to be sent."""
        if self._connection is None:
            return
        if self._connection.ended:
            self.head_ended = self._connection.by_peer and not self.lost
            self.give_up(f"closed the connection ({self._connection.ended})")
        else:
            writing = selectors.EVENT_WRITE if self._connection.backlog else 0
            self._watch(self._connection.sock, selectors.EVENT_READ | writing)

    def _watch(self, sock: socket.socket | None, events: int = 0) -> None:
        """Have the selector watch this socket, and no other of this uplink."""
        if self._watched is not None and self._watched is not sock:
            self._selector.unregister(self._watched)
            self._watched = None
        if sock is None:
            return
        if self._watched is None:
            self._selector.register(sock, events, SocketKey(self._owner))
        elif self._selector.get_key(sock).events != events:
            self._selector.modify(sock, events, SocketKey(self._owner))
        self._watched = sock
