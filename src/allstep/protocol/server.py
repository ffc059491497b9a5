"""The listening side of a service: its sockets, who may connect, and what they send.

The owner drives a `MessageServer` with `ready` and `tick`, and has each thing that happened handled by `handle`: a peer
connected, sent a message, or is gone. A newcomer first proves that it has the key (`authentication`), and its first
message is one that the owner `admits`. All others are turned away:
- Who does not have the key learns nothing. It has `INTRODUCTION_S` and a few hundred bytes to prove itself.
- One that has the key and that the owner objects to is told why.
- Nobody's bytes raise through the owner's loop. What cannot be read or handled costs its sender the connection.
- Strangers are bounded in number, to what leaves descriptors for the run's own processes. One too many takes the place
  of the one that has waited longest, of the address from which most have come.
Nothing blocks.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from allstep.errors import ChannelError, OtherVersionError
from allstep.protocol.authentication import LONGEST as LONGEST_HANDSHAKE
from allstep.protocol.authentication import ListeningHandshake
from allstep.protocol.connection import LONGEST_LINE, Connection
from allstep.protocol.descriptors import descriptor_limit
from allstep.protocol.messages import NodeHello, RankHello, Refused, decode, encode

INTRODUCTION_S = 10.0
"""Seconds that a newcomer has to prove and introduce itself."""

FIRST_LINE = 1 << 18
"""Bytes of a newcomer's first message, at most: a rank's hello has its facts, a relay's names its ranks."""

FEWEST_STRANGERS, MOST_STRANGERS = 8, 1024
"""Connections that have not introduced themselves, at most: a quarter of what the process may open, between these."""

_LAST_WORD_S = 2.0  # that a peer has to read its last message
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
    """One connection. `rank` is for the owner to note whose it is; a relay's has none. `host` is its address."""

    __slots__ = ("closing", "connection", "handshake", "host", "introduced", "leave_by", "rank", "writing")

    def __init__(self, connection: Connection, host: str, handshake: ListeningHandshake, leave_by: float) -> None:
        self.connection = connection
        self.host = host
        self.handshake: ListeningHandshake | None = handshake  # None once the peer has proved that it has the key
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


@dataclass(frozen=True, slots=True)
class StrangerLeft:
    """Somebody at this address asked for proof and then had none: most often a process with another key."""

    host: str


Happening = PeerConnected | PeerMessage | PeerGone | StrangerLeft
"""What happens at a server."""


class MessageServer:
    """The listening socket of a service and all connections to it.

    Args:
        selector: the driver's.
        listener: a listening socket, the server's from now on.
        owner: whom ready sockets are given to; see `SocketKey`.
        key: what those who connect have to have.
        admits: called with a newcomer's first message: None lets it in, a text tells it why not, "" just closes.
        clock: seconds, never turned back.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        owner: SocketOwner,
        *,
        key: str,
        admits: Callable[[object], str | None],
        clock: Callable[[], float],
    ) -> None:
        self._selector = selector
        self._listener = listener
        self._owner = owner
        self._key = key
        self._port = listener.getsockname()[1]
        self._admits = admits
        self._clock = clock
        self._peers: set[Peer] = set()
        self._limited: dict[Peer, None] = {}  # with a time to be gone by, in the order in which they came
        self._most = max(FEWEST_STRANGERS, min(MOST_STRANGERS, descriptor_limit() // 4))
        self._happened: list[Happening] = []
        self._accept_at: float | None = None
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, SocketKey(owner))

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        peer = key.data.peer
        if peer is None:
            self._accept()
        elif peer in self._peers:
            try:
                if peer.writing:
                    peer.connection.flush()
                for line in peer.connection.receive():
                    self._receive(peer, line)
                    if peer not in self._peers:
                        return
                self._update(peer)
            except Exception as error:
                self._drop(peer, _unhandled(error))

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

    def handle(self, act: Callable[[Happening], object]) -> None:
        """Have everything that happened since the last call handled, and what follows from that.

        Args:
            act: handles one. Where it raises, the peer whose message it was is dropped, and the rest goes on.
        """
        while self._happened:
            happened, self._happened = self._happened, []
            for each in happened:
                try:
                    act(each)
                except Exception as error:
                    # Whatever a peer has sent, the loop that serves all others goes on.
                    if isinstance(each, PeerConnected | PeerMessage):
                        self._drop(each.peer, _unhandled(error))

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
        self._limited[peer] = None
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
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._make_room():
                    continue
                # No more descriptors: what is ready stays ready, so look again in a moment.
                self._selector.unregister(self._listener)
                self._accept_at = self._clock() + _RETRY_S
                return
            if len(self._limited) >= self._most:
                self._make_room()
            handshake = ListeningHandshake(self._key, self._port)
            host = str(address[0]).removeprefix("::ffff:")
            peer = Peer(Connection(sock, LONGEST_HANDSHAKE), host, handshake, self._clock() + INTRODUCTION_S)
            self._peers.add(peer)
            self._limited[peer] = None
            self._selector.register(sock, selectors.EVENT_READ, SocketKey(self._owner, peer))

    def _make_room(self) -> bool:
        """Drop the stranger that has waited longest, of the address that has most of them; false if there is none."""
        strangers = [peer for peer in self._limited if not peer.introduced]
        if not strangers:
            return False
        ((crowded, _),) = Counter(peer.host for peer in strangers).most_common(1)
        self._drop(next(peer for peer in strangers if peer.host == crowded), "")
        return True

    def _receive(self, peer: Peer, line: bytes) -> None:
        if peer not in self._peers or peer.closing:
            return
        try:
            if peer.handshake is not None:
                self._shake_hands(peer, peer.handshake, line)
                return
            message = decode(line)
        except ChannelError as error:
            if peer.introduced:
                self._drop(peer, f"it sent {error}")
            else:
                # Another version of this protocol is told so; who else has not proved itself learns nothing.
                told = peer.handshake is None or isinstance(error, OtherVersionError)
                self._turn_away(peer, str(error) if told else "")
            return
        if peer.introduced:
            self._happened.append(PeerMessage(peer, message, line))
            return
        objection = self._admits(message)
        if objection is not None:
            self._turn_away(peer, objection)
            return
        peer.introduced, peer.leave_by = True, None
        peer.connection.longest = LONGEST_LINE
        self._limited.pop(peer, None)
        self._happened.append(PeerConnected(peer, message, line))

    def _shake_hands(self, peer: Peer, handshake: ListeningHandshake, line: bytes) -> None:
        if answer := handshake.receive(line):
            peer.connection.send(answer)
            return
        # A stranger could send anything, so only one that has the key may send lines as long as hellos are.
        peer.handshake = None
        peer.connection.longest = FIRST_LINE

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
        if peer not in self._peers:
            return
        self._peers.discard(peer)
        self._limited.pop(peer, None)
        self._selector.unregister(peer.connection.sock)
        peer.connection.close()
        if peer.introduced and not peer.closing:
            self._happened.append(PeerGone(peer, why))
        elif peer.handshake is not None and peer.handshake.answered and not peer.closing:
            self._happened.append(StrangerLeft(peer.host))


def _unhandled(error: Exception) -> str:
    return f"what it sent could not be handled ({type(error).__name__})"


def same_attempt(attempt: int) -> Callable[[object], str | None]:
    """What a monitor `admits` of those that have its key: ranks and relays of this attempt."""

    def admits(message: object) -> str | None:
        if not isinstance(message, RankHello | NodeHello):
            return ""
        if message.attempt != attempt:
            return f"this is attempt {attempt} of the run, and not attempt {message.attempt}"
        return None

    return admits
