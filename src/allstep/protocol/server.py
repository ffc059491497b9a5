"""The listening side of a service: who may come in, and what they say.

Contract: the owner drives it with `ready` and `tick` and takes what happened with `take`: a peer came (its first
message is one that the gate `admits`), said something, or is gone. Everybody else is turned away: whom the gate has an
objection to is told so, who sends garbage, a line without end or nothing at all within `HELLO_S` is closed on.
Strangers are bounded in number. Nothing blocks.
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
from allstep.protocol.codec import Codec
from allstep.protocol.connection import LONGEST_LINE, Connection
from allstep.protocol.messages import Hello, NodeHello, Refused

HELLO_S = 10.0
"""Seconds in which a newcomer has to introduce itself."""

FIRST_LINE = 1 << 18
"""Bytes of a newcomer's first line, at most: a rank's hello has its facts, a relay's names its ranks."""

_PARTING_S = 2.0
_STRANGERS = 4096
_ACCEPTED = 64  # taken at a time
_RETRY_S = 0.2


class Owner(Protocol):
    """Whose sockets they are."""

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""


@dataclass(frozen=True, slots=True)
class HubKey:
    """What a selector's key stands for: a socket of the service `owner`; no peer: the listening one, or an uplink's."""

    owner: Owner
    peer: Peer | None = None


class Peer:
    """One connection. `name` is for the owner to say who it is, once it came in."""

    __slots__ = ("came", "connection", "leave_by", "name", "parting", "writing")

    def __init__(self, connection: Connection, leave_by: float) -> None:
        self.connection = connection
        self.came = False
        self.leave_by: float | None = leave_by
        self.name: int | None = None
        self.parting = False
        self.writing = False


@dataclass(frozen=True, slots=True)
class Came:
    """A peer introduced itself as it should."""

    peer: Peer
    message: Any
    line: bytes


@dataclass(frozen=True, slots=True)
class Said:
    """A peer that came in sent a message; `line` is how it was written."""

    peer: Peer
    message: Any
    line: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """The connection of a peer that had come in is over."""

    peer: Peer
    why: str


class MessageServer:
    """The listening socket of a service and all connections to it.

    Args:
        selector: the driver's.
        listener: a listening socket, the gate's from now on.
        owner: whom ready sockets are given to; see `HubKey`.
        codec: of what is said here; `Refused` is part of it.
        admits: called with a newcomer's first message: None lets it in, a text tells it why not, "" just closes.
        clock: seconds, never turned back.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        owner: Owner,
        *,
        codec: Codec,
        admits: Callable[[object], str | None],
        clock: Callable[[], float],
    ) -> None:
        self._selector = selector
        self._listener = listener
        self._owner = owner
        self._codec = codec
        self._admits = admits
        self._clock = clock
        self._peers: set[Peer] = set()
        self._leaving: set[Peer] = set()  # not yet come in, or sent away: those with a time to be gone by
        self._happened: list[Came | Said | Gone] = []
        self._accept_at: float | None = None
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, HubKey(owner))

    def ready(self, key: selectors.SelectorKey, events: int = selectors.EVENT_READ | selectors.EVENT_WRITE) -> None:
        """Act on a socket that is ready."""
        peer = key.data.peer
        if peer is None:
            self._accept()
        elif peer in self._peers:
            if events & selectors.EVENT_WRITE and peer.writing:
                peer.connection.flush()
            for line in peer.connection.receive():
                self._hear(peer, line)
            self._settle(peer)

    def tick(self) -> None:
        """Close on those whose time is over, and listen again after the system had no more descriptors."""
        now = self._clock()
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
            self._selector.register(self._listener, selectors.EVENT_READ, HubKey(self._owner))
        for peer in [peer for peer in self._leaving if peer.leave_by is not None and now >= peer.leave_by]:
            self._drop(peer, "it did not introduce itself")

    def deadline(self) -> float | None:
        """When `tick` is due."""
        times = [peer.leave_by for peer in self._leaving if peer.leave_by is not None]
        if self._accept_at is not None:
            times.append(self._accept_at)
        return min(times, default=None)

    def take(self) -> list[Came | Said | Gone]:
        """What happened since the last call."""
        happened, self._happened = self._happened, []
        return happened

    def send(self, peer: Peer, line: bytes) -> None:
        """Send an encoded message to a peer, now or when it reads."""
        if peer in self._peers:
            peer.connection.send(line)
            self._settle(peer)

    def refuse(self, peer: Peer, reason: str, *, stranger: bool = False) -> None:
        """Tell a peer why it cannot stay, and be done with it."""
        self.part(peer, self._codec.encode(Refused(reason, stranger)))

    def part(self, peer: Peer, line: bytes) -> None:
        """Send a peer a last message, and be done with it: it is reported neither as heard nor as gone any more."""
        if peer not in self._peers:
            return
        peer.parting = True
        peer.leave_by = self._clock() + _PARTING_S
        self._leaving.add(peer)
        peer.connection.send(line)
        if not peer.connection.backlog:
            with contextlib.suppress(OSError):
                peer.connection.sock.shutdown(socket.SHUT_WR)
        self._settle(peer)

    def close(self) -> None:
        """Close all sockets, this side's listener too."""
        if self._listener.fileno() == -1:
            return
        for peer in list(self._peers):
            self._drop(peer, "closed")
        if self._accept_at is None:
            self._selector.unregister(self._listener)
        self._listener.close()
        self._happened.clear()

    def _accept(self) -> None:
        for _ in range(_ACCEPTED):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no more descriptors: what is ready stays ready, so look again in a moment
                self._selector.unregister(self._listener)
                self._accept_at = self._clock() + _RETRY_S
                return
            if len(self._leaving) >= _STRANGERS:
                sock.close()
                continue
            peer = Peer(Connection(sock, FIRST_LINE), self._clock() + HELLO_S)
            self._peers.add(peer)
            self._leaving.add(peer)
            self._selector.register(sock, selectors.EVENT_READ, HubKey(self._owner, peer))

    def _hear(self, peer: Peer, line: bytes) -> None:
        if peer not in self._peers or peer.parting:
            return
        try:
            message = self._codec.decode(line)
        except ChannelError as error:
            if peer.came:
                self._drop(peer, f"it sent {error}")
            else:
                self._turn_away(peer, str(error) if b'"v"' in line else "")
            return
        if peer.came:
            self._happened.append(Said(peer, message, line))
            return
        objection = self._admits(message)
        if objection is not None:
            self._turn_away(peer, objection)
            return
        peer.came, peer.leave_by = True, None
        peer.connection.longest = LONGEST_LINE
        self._leaving.discard(peer)
        self._happened.append(Came(peer, message, line))

    def _turn_away(self, peer: Peer, reason: str) -> None:
        if reason:
            self.refuse(peer, reason, stranger=True)
        else:
            self._drop(peer, "")

    def _settle(self, peer: Peer) -> None:
        """Drop a connection that is over; wait for room exactly while something waits to be sent."""
        if peer not in self._peers:
            return
        connection = peer.connection
        if connection.ended:
            self._drop(peer, connection.ended)
        elif (connection.backlog > 0) != peer.writing:
            peer.writing = not peer.writing
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.writing else 0)
            self._selector.modify(connection.sock, events, HubKey(self._owner, peer))

    def _drop(self, peer: Peer, why: str) -> None:
        self._peers.discard(peer)
        self._leaving.discard(peer)
        self._selector.unregister(peer.connection.sock)
        peer.connection.close()
        if peer.came and not peer.parting:
            self._happened.append(Gone(peer, why))


def who_knows(nonce: str, attempt: int) -> Callable[[object], str | None]:
    """What a service of the control channel `admits`: ranks and relays of this start of this run."""

    def admits(message: object) -> str | None:
        if not isinstance(message, Hello | NodeHello):
            return ""
        if not hmac.compare_digest(message.nonce.encode(), nonce.encode()):
            return "another run's service is at this address: the nonce is not this run's"
        if message.attempt != attempt:
            return f"this is attempt {attempt} of the run, and not attempt {message.attempt}"
        return None

    return admits
