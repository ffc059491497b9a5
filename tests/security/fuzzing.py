"""Messages at random, and every port of allstep with somebody who sends them.

`random_line` gives lines: most are messages of the protocol with values at random, some are not messages at all. A
`Port` is a service that the test drives, with a peer that has proved itself, since what others may send is little.
"""

from __future__ import annotations

import contextlib
import json
import random
import selectors
import socket
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from allstep.launch.event_loop import EventLoop
from allstep.launch.join_server import JoinServer
from allstep.monitor.hub import Hub
from allstep.monitor.relay import Relay
from allstep.monitor.service import MonitorSettings
from allstep.protocol.authentication import ListeningHandshake
from allstep.protocol.connection import Connection
from allstep.protocol.messages import VERSION, JoinRequest, Message, NodeHello, RankHello, encode
from tests.monitor.driving import Clock, listening, registration
from tests.protocol.proving import HOST, KEY, prove

KINDS: tuple[type[Any], ...] = typing.get_args(Message)
WORLD_SIZE = 3

_NUMBERS = (0, 1, 2, 3, -1, 7, 1 << 31, (1 << 63) - 1, -(1 << 63))
_FLOATS = (0.0, -0.0, 0.5, 1e-300, 1e18, -1.0, 1e300)
_TEXTS = ("", "step", "data", "a" * 300, "\ud800", "\x1b[2J", "\n", "..", "ü", "\x00", "128.0.0.1", "‮")
_ANYTHING = (None, True, [], {}, [[]], {"a": {"b": []}}, 1e400, "x", -1, [1, "x"])


def random_value(draw: random.Random, hint: Any) -> Any:
    """A value that a field of this type may have, as JSON has it."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        return [random_value(draw, typing.get_args(hint)[0]) for _ in range(draw.randrange(4))]
    if origin in (Mapping, dict):
        item = typing.get_args(hint)[1]
        return {draw.choice(_TEXTS): random_value(draw, item) for _ in range(draw.randrange(3))}
    if is_dataclass(hint):
        return random_body(draw, hint)
    if hint is float:
        return draw.choice(_FLOATS)
    if hint is bool:
        return draw.random() < 0.5
    if hint is int:
        return draw.choice(_NUMBERS)
    if hint is str:
        return draw.choice(_TEXTS)
    return draw.choice([None, draw.choice(_NUMBERS), draw.choice(_TEXTS)])  # a union


def random_body(draw: random.Random, kind: type[Any]) -> dict[str, Any]:
    hints = _hints(kind)
    return {each.name: random_value(draw, hints[each.name]) for each in fields(kind)}


_known_hints: dict[type[Any], dict[str, Any]] = {}


def _hints(kind: type[Any]) -> dict[str, Any]:
    if kind not in _known_hints:
        _known_hints[kind] = typing.get_type_hints(kind)
    return _known_hints[kind]


def random_line(draw: random.Random, rank: int | None = None, garbage: float = 0.05) -> bytes:
    """A line, its end included: a message with values at random, often of this rank, or (`garbage`) something else."""
    kind = draw.choice(KINDS)
    body = {"v": VERSION, "type": kind.__name__, **random_body(draw, kind)}
    if rank is not None and "rank" in body and draw.random() < 0.8:
        body["rank"] = rank
    what = draw.randrange(3) if draw.random() < garbage else None
    if what == 0:
        body[draw.choice(list(body))] = draw.choice(_ANYTHING)
    elif what == 1:
        del body[draw.choice(list(body))]
    line = json.dumps(body).encode()
    if what == 2:
        cut = draw.randrange(len(line))
        line = line[:cut] + draw.randbytes(draw.randrange(8)) + line[cut + draw.randrange(3) :]
    return line.replace(b"\n", b" ") + b"\n"


HELLO = RankHello(0, registration(1, WORLD_SIZE))


class Port:
    """A service and somebody who speaks to it.

    Args:
        come: what a peer says first, once it has proved itself; None: nothing.
        rank: of which it then mostly speaks.
    """

    def __init__(self, come: Message | None, rank: int | None) -> None:
        self.rank = rank
        self._come = come
        self._peer: Connection | None = None
        self.listener = listening()
        self.number = self.listener.getsockname()[1]

    def turn(self) -> None:
        """Serve what is there."""
        raise NotImplementedError

    def served(self) -> bool:
        """Whether somebody who behaves is still served."""
        newcomer = self._connected()
        newcomer.close()
        return True

    def send(self, lines: bytes) -> None:
        """Send these, over a new connection where the service has closed the last one."""
        if self._peer is None or self._peer.ended:
            self.leave()
            self._peer = self._connected()
            if self._come is not None:
                self._peer.send(encode(self._come))
                self.turn()
        self._peer.send(lines)
        self.turn()
        while self._peer.backlog and not self._peer.ended:
            self._peer.flush()
            self.turn()
        for _ in self._peer.receive():
            pass

    @property
    def closed(self) -> bool:
        """Whether the service has closed the last connection."""
        return self._peer is not None and bool(self._peer.ended)

    def leave(self) -> None:
        """Close the connection."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def _connected(self) -> Connection:
        connection = Connection(socket.create_connection((HOST, self.number)))
        prove(connection, self.number, self.turn)
        return connection


class MonitorPort(Port):
    """A hub or a relay; `others` are ranks that have come too, so that the one who speaks is let in."""

    def __init__(
        self, make: Callable[..., Any], come: Message | None, rank: int | None, others: tuple[int, ...] = ()
    ) -> None:
        super().__init__(come, rank)
        self.clock = Clock()
        self.selector = selectors.DefaultSelector()
        self.service = make(self.selector, self.listener, self.clock)
        self.others = [self._connected() for _ in others]
        for connection, other in zip(self.others, others, strict=True):
            connection.send(encode(RankHello(0, registration(other, WORLD_SIZE))))
        self.turn()

    def turn(self) -> None:
        for key, _ in self.selector.select(0.0005):
            self.service.ready(key)
        self.clock.now += 0.001
        if self.clock() >= self.service.deadline():
            self.service.tick()
        self.service.take()

    def close(self) -> None:
        self.leave()
        for connection in self.others:
            connection.close()
        self.service.close()
        self.selector.close()


def hub(come: Message | None, rank: int | None) -> MonitorPort:
    def make(selector: selectors.BaseSelector, listener: socket.socket, clock: Clock) -> Hub:
        made = Hub(selector, listener, MonitorSettings(KEY, 0, WORLD_SIZE), clock=clock)
        made.expect_node(1)
        return made

    return MonitorPort(make, come, rank, tuple({0, 1, 2} - {rank}) if come is HELLO else ())


def relay(come: Message | None, rank: int | None) -> MonitorPort:
    def make(selector: selectors.BaseSelector, listener: socket.socket, clock: Clock) -> Relay:
        # The head refuses connections: what is tried here comes from ranks.
        settings = MonitorSettings(KEY, 0, WORLD_SIZE)
        return Relay(selector, listener, settings, upstream=(HOST, 9), node_rank=1, ranks=(0, 1), clock=clock)

    return MonitorPort(make, come, rank)


class HeadPort(MonitorPort):
    """A relay whose head is the test's; where the relay has left one head, another relay comes."""

    def __init__(self) -> None:
        self.heads = listening()
        super().__init__(self._make, None, None)

    def _make(self, selector: selectors.BaseSelector, listener: socket.socket, clock: Clock) -> Relay:
        upstream = HOST, self.heads.getsockname()[1]
        settings = MonitorSettings(KEY, 0, WORLD_SIZE)
        return Relay(selector, listener, settings, upstream=upstream, node_rank=1, ranks=(0, 1), clock=clock)

    def _connected(self) -> Connection:
        self.service.close()
        self.listener = listening()
        self.number = self.listener.getsockname()[1]
        self.service = self._make(self.selector, self.listener, self.clock)
        while True:
            connection = Connection(self.heads.accept()[0])
            handshake = ListeningHandshake(KEY, self.heads.getsockname()[1])
            while (line := self._line(connection)) is not None and (reply := handshake.receive(line)):
                connection.send(reply)
            if line is not None:
                return connection
            connection.close()  # of a relay that was there before

    def _line(self, connection: Connection) -> bytes | None:
        while (line := next(connection.receive(), None)) is None and not connection.ended:
            self.turn()
        return line

    def close(self) -> None:
        super().close()
        self.heads.close()


class JoinPort(Port):
    """Where machines join."""

    def __init__(self, come: Message | None, rank: int | None) -> None:
        super().__init__(come, rank)
        self.loop = EventLoop()
        self.said: list[str] = []
        own = JoinRequest(WORLD_SIZE, 0, 1, "head", 1)
        self.server = JoinServer(self.loop, self.listener, KEY, own, self.said.append)

    def turn(self) -> None:
        self.loop.turn(0.0)

    def close(self) -> None:
        self.leave()
        self.server.close()
        self.loop.close()


PORTS: dict[str, Callable[[], Any]] = {
    "a stranger at a hub": lambda: hub(None, None),
    "a rank at a hub": lambda: hub(HELLO, 1),
    "a relay at a hub": lambda: hub(NodeHello(0, 1, "h1", (1, 2)), 1),
    "a rank at a relay": lambda: relay(HELLO, 1),
    "a stranger at a relay": lambda: relay(None, None),
    "a head at a relay": HeadPort,
    "a machine that joins": lambda: JoinPort(None, None),
}


@contextlib.contextmanager
def opened(name: str) -> Iterator[Any]:
    with contextlib.closing(PORTS[name]()) as port:
        yield port
