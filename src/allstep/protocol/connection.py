"""A socket that carries lines, and the one way in which every client of this package comes to have one.

`Connection` holds a connected socket. `receive` gives the whole lines that have come. `send` takes bytes and passes on
what the other side has room for; the rest waits in `backlog` for `flush`. Neither blocks and neither raises: once the
connection is over, `ended` says why, and `by_peer` whether the other side's system said so, rather than nobody. The
length of a line, and what waits for a slow reader, are bounded.

`Connector` makes the connection: it tries one address after another, again and again, until one answers and proves that
it has the key (`authentication`), or the time is over. Until then this side has told nothing about itself. It never
blocks. An event loop drives it (a relay's, a machine's that joins a run), or `connect` does,
for a rank that has nothing else to do. What can go wrong is in `failed`, for the caller's own error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from allstep.errors import ChannelError
from allstep.protocol.authentication import LONGEST as LONGEST_HANDSHAKE
from allstep.protocol.authentication import ConnectingHandshake
from allstep.protocol.name_lookup import NameLookup, SocketAddress

Target = tuple[str, int]
"""A host and a port to connect to."""

LONGEST_LINE = 4 << 20
"""Bytes of a line, at most: the stacks of a rank with many threads take some tens of thousands."""

LARGEST_BACKLOG = 16 << 20
"""Bytes that wait for a peer that does not read, at most; then its connection ends."""

PAUSE_S = 0.25
"""Seconds between two rounds through all addresses."""

_NO_MORE = object()  # addresses in this round
_CHUNK = 1 << 16
_CHUNKS = 16  # read at a time, so that one busy peer does not keep the others waiting


class Connection:
    """A connected socket; owned by this object from now on."""

    def __init__(self, sock: socket.socket, longest: int = LONGEST_LINE) -> None:
        sock.setblocking(False)
        # Messages are small and waited for. Without this, one may be held back until the last one was acknowledged.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.longest = longest
        self.ended = ""
        self.by_peer = False
        self._in = bytearray()
        self._searched = 0  # bytes of `_in` that have no line's end
        self._out = bytearray()

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._out)

    def receive(self) -> Iterator[bytes]:
        """The lines that have come, without their ends, one by one: `longest` may be changed between two of them."""
        for _ in range(_CHUNKS):
            try:
                data = self.sock.recv(_CHUNK)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._broke(error)
                break
            if not data:
                self._end("closed by the other side", by_peer=True)
                break
            self._in += data
            if len(data) < _CHUNK:  # that was all; asking again would only cost a call
                break
        return self._lines()

    def send(self, data: bytes) -> None:
        """Send, now or when there is room."""
        if self.ended:
            return
        self._out += data
        self.flush()
        # Checked after the flush, so that one large message to a peer that reads is no reason.
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
                self._broke(error)
                return
            del self._out[:sent]

    def close(self) -> None:
        """Close the socket."""
        self._end("closed")
        self.sock.close()

    def _lines(self) -> Iterator[bytes]:
        while True:
            # From where the last search ended: a line that comes byte by byte is not searched from its beginning.
            length = self._in.find(b"\n", self._searched)
            if max(length, 0 if length >= 0 else len(self._in)) > self.longest:
                self._refuse(f"it sent a line of more than {self.longest} bytes")
                return
            if length == 0:
                self._refuse("it sent an empty line")  # nobody of ours does, and a million of them cost time
                return
            if length < 0:
                self._searched = len(self._in)
                return
            line = bytes(self._in[:length])
            del self._in[: length + 1]
            self._searched = 0
            yield line

    def _refuse(self, why: str) -> None:
        """Read no more of what came, and end."""
        self._end(why)
        self._in.clear()
        self._searched = 0

    def _broke(self, error: OSError) -> None:
        self._end(error.strerror or str(error), by_peer=error.errno in (errno.ECONNRESET, errno.EPIPE))

    def _end(self, why: str, *, by_peer: bool = False) -> None:
        if not self.ended:  # the first reason is the cause
            self.ended, self.by_peer = why, by_peer


class Connector:
    """A connection in the making.

    The driver waits until `sock` is ready for `events`, or until `deadline`, and then calls `advance`. Afterwards
    either `connection` is there, or `failed` says why there will be none, or it waits on. `sock` changes with each
    attempt, and is None in the pause between two rounds through all addresses.

    Attributes:
        target: the host and port of the last attempt.
        problems: why the last attempt at each target failed.
        others: targets at which something answered that is not ours.
        until: the time on the clock at which to give up; may be moved.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        key: str,
        within: float,
        clock: Callable[[], float] = time.monotonic,
        answer: float,
        proof: float | None = None,
        retry: bool = True,
        addresses: Callable[[str, int], Sequence[SocketAddress] | None] | None = None,
    ) -> None:
        """Begin to connect.

        Args:
            targets: hosts and ports, each with all of its addresses, in the order in which to try them.
            key: what the other side has to have.
            within: seconds in which one must have answered; once more, where what had accepted by then closed later. A
                service closes on a process of its own run that did not get to introduce itself in time.
            clock: seconds, never turned back.
            answer: seconds that each address has to answer.
            proof: seconds that it then has to prove itself, also where `within` has passed; by default as `answer`.
            retry: begin again when all have been tried; else that is the end. Where the only target is another's
                service, it is the end too.
            addresses: resolves a target, anew in each round, since a name may come to resolve only later; None while
                its addresses are not known. By default a `NameLookup`.
        """
        self.connection: Connection | None = None
        self.failed = ""
        self.target = targets[0]
        self.problems: dict[Target, str] = {}
        self.until = clock() + within
        self._targets = targets
        self._key = key
        self._resolve = NameLookup() if addresses is None else addresses
        self._clock = clock
        self._answer = answer
        self._proof = answer if proof is None else proof
        self._retry = retry
        self._again = within if retry else 0.0  # once more, where what had accepted closed too late for another try
        self._sock: socket.socket | None = None
        self._unproven: Connection | None = None
        self._handshake: ConnectingHandshake | None = None
        self.others: set[Target] = set()
        self._attempts = self._round()
        self._next_at = clock()
        self.advance()

    @property
    def sock(self) -> socket.socket | None:
        """The socket to wait for."""
        return self._sock if self._unproven is None else self._unproven.sock

    @property
    def events(self) -> int:
        """What to wait for on it, as `selectors` has it."""
        return selectors.EVENT_WRITE if self._unproven is None else selectors.EVENT_READ

    def deadline(self) -> float:
        """When `advance` is due, on the clock, though the socket did not become ready."""
        return self._next_at if self._unproven is not None else min(self._next_at, self.until)

    def advance(self) -> None:
        """Act on a socket that is ready, or on the time that has passed."""
        if self.connection is not None or self.failed:
            return
        now = self._clock()
        # A socket that was connected, and one that was refused, can both be written to; SO_ERROR tells them apart.
        if self._sock is not None and is_ready(self._sock.fileno(), writing=True):
            self._conclude(self._sock, self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        elif self._sock is not None and now >= self._next_at:
            self._fail("it does not answer")
        if self._unproven is not None:
            self._shake_hands(self._unproven, now)
        if self.sock is None and self.connection is None and now >= self._next_at:
            self._try_next(now)
        if self.connection is None and self._unproven is None and now >= self.until:
            self._give_up()

    def reject(self, why: str) -> None:
        """What answered is of no use: close the connection, and go on with the next address."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        self._fail(why)

    def close(self) -> None:
        """Close the socket of an attempt that is on its way; a connection that was made is its taker's."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._unproven is not None:
            self._unproven.close()
            self._unproven = self._handshake = None

    def _round(self) -> Iterator[tuple[Target, SocketAddress] | None]:
        """Every address of every target; None where the next one is not known yet."""
        for target in self._targets:
            try:
                # The time that each address has to answer, a name server has too; then the next target's turn comes.
                until = self._clock() + self._answer
                while (found := self._resolve(*target)) is None and self._clock() < until:
                    self.problems[target] = "its name server does not answer"
                    yield None
            except OSError as error:
                self.problems[target] = error.strerror or str(error)
                continue
            for address in found or ():
                yield target, address

    def _try_next(self, now: float) -> None:
        attempt = next(self._attempts, _NO_MORE)
        if attempt is None:
            self._next_at = now + PAUSE_S
            return
        if attempt is _NO_MORE:
            if not self._retry or (self.others and len(self._targets) == 1):
                self._give_up()
            self._attempts = self._round()
            self._next_at = now + PAUSE_S  # at once again would only keep both sides busy
            return
        assert isinstance(attempt, tuple)
        self.target, (family, address) = attempt
        self._next_at = now + self._answer
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        error = sock.connect_ex(address)
        if error != errno.EINPROGRESS:
            self._conclude(sock, error)

    def _conclude(self, sock: socket.socket, error: int) -> None:
        """The system has said what came of an attempt."""
        if error:
            self._fail(os.strerror(error))
            return
        self._unproven, self._sock = Connection(sock, LONGEST_HANDSHAKE), None
        self._handshake = ConnectingHandshake(self._key, self.target[1])
        self._unproven.send(self._handshake.first)
        self._next_at = self._clock() + self._proof

    def _shake_hands(self, unproven: Connection, now: float) -> None:
        """Go on with the handshake."""
        assert self._handshake is not None
        line = next(unproven.receive(), None)
        if line is not None:
            try:
                unproven.send(self._handshake.prove(line))
            except ChannelError as error:
                self.others.add(self.target)
                self._fail(str(error))
                return
            unproven.longest = LONGEST_LINE
            self.connection, self._unproven, self._handshake = unproven, None, None
        elif unproven.ended:
            self._fail(f"it did not prove that it is this run's: {unproven.ended}")
            if now >= self.until:
                self.until, self._again = now + self._again, 0.0
        elif now >= self._next_at:
            self._fail("it accepts and says nothing; its process may be frozen")

    def _give_up(self) -> None:
        self.close()
        self.failed = "; ".join(dict.fromkeys(self.problems.values())) or "it does not answer"

    def _fail(self, why: str) -> None:
        self.close()
        self.problems[self.target] = why
        self._next_at = self._clock()


def connect(
    targets: Sequence[Target],
    *,
    key: str,
    within: float,
    answer: float,
    proof: float | None = None,
    retry: bool = True,
) -> Connection:
    """Connect to the first target that answers and has the key, and wait for that; see `Connector` for the arguments.

    Raises:
        ConnectionError: none did; the text says why.
    """
    connector = Connector(targets, key=key, within=within, answer=answer, proof=proof, retry=retry)
    with contextlib.closing(connector):
        while connector.connection is None:
            if connector.failed:
                raise ConnectionError(connector.failed)
            descriptor = None if connector.sock is None else connector.sock.fileno()
            writing = connector.events == selectors.EVENT_WRITE
            is_ready(descriptor, connector.deadline() - time.monotonic(), writing=writing)
            connector.advance()
        return connector.connection


def is_ready(descriptor: int | None, seconds: float = 0.0, *, writing: bool = False) -> bool:
    """Wait until something can be read, or written, for `seconds` at most; with no descriptor only that long.

    A pidfd can be read once its process has ended. Unlike `select.select`, this takes descriptors of any number.
    """
    poll = select.poll()
    if descriptor is not None:
        poll.register(descriptor, select.POLLOUT if writing else select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))
