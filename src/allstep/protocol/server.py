"""The listening side of a service: its sockets, who may connect, and what they send.

The owner drives a `MessageServer` with `ready` and `tick`, and takes what happened with `take`: a peer connected (its
first message was one that the owner `admits`), sent a message, or is gone. All others are turned away. A newcomer
that the owner objects to is told why. One that sends garbage, a line without end, or nothing within `INTRODUCTION_S`,
is closed without a word, and the number of such strangers is bounded. Nothing blocks.
"""

from __future__ import annotations

import contextlib
import hmac
import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from allstep.errors import ChannelError
from allstep.protocol.connection import LONGEST_LINE, Connection
from allstep.protocol.messages import NodeHello, RankHello, Refused, decode, encode

INTRODUCTION_S = 10.0
"""Seconds that a newcomer has to introduce itself."""

FIRST_LINE = 1 << 18
"""Bytes of a newcomer's first line, at most: a rank's hello has its facts, a relay's names its ranks."""

_LAST_WORD_S = 2.0  # that a peer has to read its last message
_STRANGERS = 4096  # who are connected at once without having introduced themselves
_ACCEPTED = 64  # taken at a time
_RETRY_S = 0.2  # until descriptors may be free again


class SocketOwner(Protocol):
    """What a driver gives the ready sockets of a service to."""

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""


@dataclass(frozen=True, slots=True)
class SocketKey:
    """What a selector's key stands for: a socket of `owner`. Without a peer it is the listening one, or an uplink's."""

    owner: SocketOwner
    peer: Peer | None = None


class Peer:
    """One connection. `rank` is for the owner to note whose it is; a relay's has none."""

    __slots__ = ("closing", "connection", "introduced", "leave_by", "rank", "writing")

    def __init__(self, connection: Connection, leave_by: float) -> None:
        self.connection = connection
        self.introduced = False
        self.leave_by: float | None = leave_by
        self.rank: int | None = None
        self.closing = False
        self.writing = False


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A peer introduced itself as it should."""

    peer: Peer
    message: Any
    line: bytes


@dataclass(frozen=True, slots=True)
class PeerMessage:
    """An introduced peer sent a message; `line` is how it was written."""

    peer: Peer
    message: Any
    line: bytes


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The connection of an introduced peer is over."""

    peer: Peer
    why: str


class MessageServer:
    """The listening socket of a service and all connections to it.

    Args:
        selector: the driver's.
        listener: a listening socket, the server's from now on.
        owner: whom ready sockets are given to; see `SocketKey`.
        admits: called with a newcomer's first message: None lets it in, a text tells it why not, "" just closes.
        clock: seconds, never turned back.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        owner: SocketOwner,
        *,
        admits: Callable[[object], str | None],
        clock: Callable[[], float],
    ) -> None:
        self._selector = selector
        self._listener = listener
        self._owner = owner
        self._admits = admits
        self._clock = clock
        self._peers: set[Peer] = set()
        self._limited: set[Peer] = set()  # those with a time to be gone by: not yet introduced, or closing
        self._happened: list[PeerConnected | PeerMessage | PeerGone] = []
        self._accept_at: float | None = None
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, SocketKey(owner))

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        peer = key.data.peer
        if peer is None:
            self._accept()
        elif peer in self._peers:
            if peer.writing:
                peer.connection.flush()
            for line in peer.connection.receive():
                self._receive(peer, line)
            self._update(peer)

    def tick(self) -> None:
        """Close on those whose time is over, and listen again after the system had no more descriptors."""
        now = self._clock()
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
            self._selector.register(self._listener, selectors.EVENT_READ, SocketKey(self._owner))
        for peer in [peer for peer in self._limited if peer.leave_by is not None and now >= peer.leave_by]:
            self._drop(peer, "it did not introduce itself")

    def deadline(self) -> float | None:
        """When `tick` is due."""
        times = [peer.leave_by for peer in self._limited if peer.leave_by is not None]
        if self._accept_at is not None:
            times.append(self._accept_at)
        return min(times, default=None)

    def take(self) -> list[PeerConnected | PeerMessage | PeerGone]:
        """What happened since the last call."""
        happened, self._happened = self._happened, []
        return happened

    def send(self, peer: Peer, line: bytes) -> None:
        """Send an encoded message to a peer, now or when it reads."""
        if peer in self._peers:
            peer.connection.send(line)
            self._update(peer)

    def refuse(self, peer: Peer, reason: str, *, stranger: bool = False) -> None:
        """Tell a peer why it cannot stay, and be done with it."""
        self.send_last(peer, encode(Refused(reason, stranger)))

    def send_last(self, peer: Peer, line: bytes) -> None:
        """Send a peer a last message and close; nothing that it sends, nor its end, is reported any more."""
        if peer not in self._peers:
            return
        peer.closing = True
        peer.leave_by = self._clock() + _LAST_WORD_S
        self._limited.add(peer)
        peer.connection.send(line)
        if not peer.connection.backlog:
            # Closing at once could reset the connection while the peer still reads the last message.
            with contextlib.suppress(OSError):
                peer.connection.sock.shutdown(socket.SHUT_WR)
        self._update(peer)

    def close(self) -> None:
        """Close all sockets, this side's listener too."""
        if self._listener.fileno() == -1:  # closed before
            return
        for peer in list(self._peers):
            self._drop(peer, "closed")
        if self._accept_at is None:
            self._selector.unregister(self._listener)
        self._listener.close()
        self._happened.clear()

    def _accept(self) -> None:
        # Not all at once: ranks that are connected already have heartbeats to be read.
        for _ in range(_ACCEPTED):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no more descriptors: what is ready stays ready, so look again in a moment
                self._selector.unregister(self._listener)
                self._accept_at = self._clock() + _RETRY_S
                return
            if len(self._limited) >= _STRANGERS:
                sock.close()
                continue
            peer = Peer(Connection(sock, FIRST_LINE), self._clock() + INTRODUCTION_S)
            self._peers.add(peer)
            self._limited.add(peer)
            self._selector.register(sock, selectors.EVENT_READ, SocketKey(self._owner, peer))

    def _receive(self, peer: Peer, line: bytes) -> None:
        if peer not in self._peers or peer.closing:
            return
        try:
            message = decode(line)
        except ChannelError as error:
            if peer.introduced:
                self._drop(peer, f"it sent {error}")
            else:
                # Another version of this protocol is told so; what is not this protocol learns nothing.
                self._turn_away(peer, str(error) if b'"v"' in line else "")
            return
        if peer.introduced:
            self._happened.append(PeerMessage(peer, message, line))
            return
        objection = self._admits(message)
        if objection is not None:
            self._turn_away(peer, objection)
            return
        peer.introduced, peer.leave_by = True, None
        # A stranger could send anything, so only an introduced peer may send lines as long as stacks are.
        peer.connection.longest = LONGEST_LINE
        self._limited.discard(peer)
        self._happened.append(PeerConnected(peer, message, line))

    def _turn_away(self, peer: Peer, reason: str) -> None:
        if reason:
            self.refuse(peer, reason, stranger=True)
        else:
            self._drop(peer, "")

    def _update(self, peer: Peer) -> None:
        """Drop a connection that is over; else watch for room to write exactly while something waits to be sent."""
        if peer not in self._peers:
            return
        connection = peer.connection
        if connection.ended:
            self._drop(peer, connection.ended)
        elif (connection.backlog > 0) != peer.writing:
            peer.writing = not peer.writing
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.writing else 0)
            self._selector.modify(connection.sock, events, SocketKey(self._owner, peer))

    def _drop(self, peer: Peer, why: str) -> None:
        self._peers.discard(peer)
        self._limited.discard(peer)
        self._selector.unregister(peer.connection.sock)
        peer.connection.close()
        if peer.introduced and not peer.closing:
            self._happened.append(PeerGone(peer, why))


def same_run(nonce: str, attempt: int) -> Callable[[object], str | None]:
    """What a monitor `admits`: ranks and relays of this attempt of this run."""

    def admits(message: object) -> str | None:
        if not isinstance(message, RankHello | NodeHello):
            return ""
        if not hmac.compare_digest(message.nonce.encode(), nonce.encode()):
            return "another run's service is at this address: the nonce is not this run's"
        if message.attempt != attempt:
            return f"this is attempt {attempt} of the run, and not attempt {message.attempt}"
        return None

    return admits
