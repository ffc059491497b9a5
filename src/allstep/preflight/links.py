"""What is between two machines: round trips, and bytes a second in both directions.

Contract: each agent has a `LinkServer`, which answers whoever has the preflight's key. `measure` connects to another
agent's and returns within about `WITHIN_S`, also where nothing answers or packets are lost. Both sides speak in lines
of the control protocol (`LinkProbe`), so no firewall rule is needed beyond what a run needs anyway: connections between
its machines at any port.

Packets that had to be sent again are the kernel's own count (TCP_INFO), as is the largest packet that fits (MTU). What
is slow is not decided here: one stream of lines does not fill a fast network, but streams of all pairs can be compared.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import threading
import time
from dataclasses import dataclass

from allstep.errors import ChannelError
from allstep.protocol.address import EVERYWHERE, listen
from allstep.protocol.authentication import LONGEST, ListeningHandshake
from allstep.protocol.connection import LONGEST_LINE, Connection, connect, is_ready
from allstep.protocol.messages import decode, encode
from allstep.protocol.preflight_messages import LinkMeasured, LinkProbe

WITHIN_S = 6.0
"""Seconds that one pair may take."""

CONNECT_S = 2.0
ROUND_TRIPS = 24
BURST_S = 0.05
"""Seconds for which a direction is filled."""

_CHUNK = 1 << 18  # characters of a line that fills the link
_LEAST = 8  # lines, so that the link is filled and not only the kernel's buffers
_REVERSE = 1 << 21  # characters that are asked for at once in the other direction
_TCP_INFO = 192  # bytes of struct tcp_info that are read
_MTU_AT, _RETRANSMITTED_AT, _SEGMENTS_AT = 60, 100, 156  # tcpi_pmtu, tcpi_total_retrans, tcpi_data_segs_out
_MOVED_AT = 120  # tcpi_bytes_acked, and behind it tcpi_bytes_received
_BY_CHANCE = 4  # packets that a busy machine sends again although nothing was lost
_SEVERAL = 1 << 17  # bytes, more than all small messages together


class LinkServer:
    """Answers probes of other agents, each connection in a thread of its own."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._listener = listen(EVERYWHERE)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True, name="allstep links").start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True, name="allstep link").start()

    def _serve(self, sock: socket.socket) -> None:
        connection = Connection(sock, LONGEST)
        until = time.monotonic() + WITHIN_S * 2
        handshake: ListeningHandshake | None = ListeningHandshake(self._key, self.port)
        with contextlib.closing(connection), contextlib.suppress(ChannelError, ConnectionError, TimeoutError):
            while True:
                for line in _lines(connection, until):
                    if handshake is None:
                        _answer(connection, line, until)
                    elif proof := handshake.receive(line):
                        connection.send(proof)
                    else:
                        handshake = None
                        connection.longest = LONGEST_LINE


def measure(peer: int, host: str, port: int, key: str) -> LinkMeasured:
    """Measure the way to a peer's agent and back."""
    until = time.monotonic() + WITHIN_S
    try:
        with contextlib.closing(
            connect([(host, port)], key=key, within=CONNECT_S, answer=CONNECT_S, retry=False)
        ) as connection:
            return _measured(peer, host, connection, until)
    except TimeoutError:
        return LinkMeasured(peer, problem=f"{host} does not answer")
    except (ConnectionError, ChannelError) as error:
        return LinkMeasured(peer, problem=f"{host}, port {port}: {error}")


def _measured(peer: int, host: str, connection: Connection, until: float) -> LinkMeasured:
    problem = "answers, and small messages do not come back"
    before = 0
    try:
        times = sorted(_round_trip(connection, until) for _ in range(ROUND_TRIPS))
        problem = "answers small messages, and large ones do not arrive (is the MTU the same on the way?)"
        sent = _fill(connection, until)
        before = _kernels_count(connection.sock).moved
        received, lost_there = _drain(connection, until)
    except TimeoutError:
        kernel = _kernels_count(connection.sock)
        if kernel.moved - before < _SEVERAL:
            return LinkMeasured(peer, problem=f"{host} {problem}")
        # Large packets do arrive, so what is wrong is how many of them.
        return LinkMeasured(peer, problem=f"{host} is so slow that it was given up", lost=kernel.lost)
    kernel = _kernels_count(connection.sock)
    lost = max(kernel.lost, lost_there)
    return LinkMeasured(peer, latency=statistics.median(times), sent=sent, received=received, lost=lost, mtu=kernel.mtu)


def greet(peer: int, host: str, port: int, key: str) -> LinkMeasured:
    """Only connect to a peer's agent, and have one answer: the way in the other direction was measured by the peer."""
    try:
        with contextlib.closing(
            connect([(host, port)], key=key, within=CONNECT_S, answer=CONNECT_S, retry=False)
        ) as connection:
            return LinkMeasured(peer, latency=_round_trip(connection, time.monotonic() + CONNECT_S))
    except TimeoutError:
        return LinkMeasured(peer, problem=f"{host} answers, and messages do not come back")
    except (ConnectionError, ChannelError) as error:
        return LinkMeasured(peer, problem=f"{host}, port {port}: {error}")


def _answer(connection: Connection, line: bytes, until: float) -> None:
    probe = decode(line)
    if not isinstance(probe, LinkProbe):
        raise ChannelError("it sent something else than a probe")
    left = probe.reply
    while left > _CHUNK:  # in lines of the size that the other direction has
        _send(connection, LinkProbe(-1, "x" * _CHUNK), until)
        left -= _CHUNK
    if left >= 0:
        _send(connection, LinkProbe(-1, "x" * left, _kernels_count(connection.sock).lost), until)


def _round_trip(connection: Connection, until: float) -> float:
    began = time.monotonic()
    _send(connection, LinkProbe(0), until)
    _receive(connection, until)
    return time.monotonic() - began


def _fill(connection: Connection, until: float) -> float:
    """Send for a moment; the bytes a second until the last of them were acknowledged by the other side."""
    began, count = time.monotonic(), 0
    line = LinkProbe(-1, "x" * _CHUNK)
    while count < _LEAST or time.monotonic() - began < BURST_S:
        _send(connection, line, until)
        count += 1
    _round_trip(connection, until)
    return count * _CHUNK / (time.monotonic() - began)


def _drain(connection: Connection, until: float) -> tuple[float, float]:
    """Have the other side send; the bytes a second, and the part of its packets that it had to send again."""
    began, size, lost = time.monotonic(), 0, 0.0
    while not size or time.monotonic() - began < BURST_S:
        _send(connection, LinkProbe(_REVERSE), until)
        while True:
            probe = _receive(connection, until)
            size += len(probe.padding)
            lost = max(lost, probe.lost)
            if len(probe.padding) < _CHUNK or size % _REVERSE == 0:
                break
    return size / (time.monotonic() - began), lost


def _send(connection: Connection, probe: LinkProbe, until: float) -> None:
    connection.send(encode(probe))
    while connection.backlog and not connection.ended:
        if not is_ready(connection.sock.fileno(), until - time.monotonic(), writing=True):
            raise TimeoutError
        connection.flush()
    if connection.ended:
        raise ConnectionError(connection.ended)


def _receive(connection: Connection, until: float) -> LinkProbe:
    line = next(iter(_lines(connection, until, most=1)))
    probe = decode(line)
    if not isinstance(probe, LinkProbe):
        raise ChannelError("it answered with something else than a probe")
    return probe


def _lines(connection: Connection, until: float, most: int = 0) -> list[bytes]:
    """At least one line, as they come; `most` stops after so many and leaves the rest for later."""
    found: list[bytes] = []
    while not found:
        for line in connection.receive():
            found.append(line)
            if len(found) == most:
                return found
        if found:
            break
        if connection.ended:
            raise ConnectionError(connection.ended)
        if not is_ready(connection.sock.fileno(), until - time.monotonic()):
            raise TimeoutError
    return found


@dataclass(frozen=True, slots=True)
class _KernelsCount:
    """What the kernel knows of a connection: bytes that arrived, both ways, the part of packets sent again, the MTU."""

    moved: int = 0
    lost: float = 0.0
    mtu: int = 0


def _kernels_count(sock: socket.socket) -> _KernelsCount:
    """Zeros where the kernel does not say."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO)
    except (OSError, AttributeError):
        return _KernelsCount()
    if len(info) < _SEGMENTS_AT + 4:
        return _KernelsCount()
    mtu, again, segments = (struct.unpack_from("I", info, at)[0] for at in (_MTU_AT, _RETRANSMITTED_AT, _SEGMENTS_AT))
    moved = sum(struct.unpack_from("QQ", info, _MOVED_AT))
    return _KernelsCount(moved, max(0, again - _BY_CHANCE) / max(segments, 1), mtu)
