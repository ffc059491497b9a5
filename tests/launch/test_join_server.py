"""The rendezvous port while an attempt runs: nothing but the loop drives it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from allstep.launch.event_loop import EventLoop
from allstep.launch.join_server import KEEPALIVE_S, JoinServer
from allstep.protocol.connection import Connection
from allstep.protocol.messages import JoinPending, JoinRequest, decode, encode
from tests.protocol.proving import KEY, prove

BOUND = 10.0  # seconds
HEAD = JoinRequest(2, 0, 1, "h0", 10, {})
OTHER = JoinRequest(2, 1, 1, "h1", 11, {})


@contextlib.contextmanager
def serving() -> Iterator[tuple[EventLoop, JoinServer, int]]:
    loop = EventLoop()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with (
        contextlib.closing(loop),
        contextlib.closing(JoinServer(loop, listener, KEY, HEAD, lambda text: None)) as server,
    ):
        yield loop, server, port


def connect(port: int) -> Connection:
    return Connection(socket.create_connection(("127.0.0.1", port), timeout=BOUND))


def turn_once(loop: EventLoop, until: float) -> None:
    assert time.monotonic() < until, f"not within {BOUND} s"
    loop.turn(until)


def test_a_stranger_that_says_nothing_is_closed_on_during_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allstep.protocol.server.INTRODUCTION_S", 0.3)
    with serving() as (loop, server, port), contextlib.closing(connect(port)) as stranger:
        server.start({})
        until = time.monotonic() + BOUND
        while not stranger.ended:
            turn_once(loop, until)
            list(stranger.receive())


def test_a_node_that_waits_during_an_attempt_gets_signs_of_life() -> None:
    with serving() as (loop, _, port), contextlib.closing(connect(port)) as other:
        until = time.monotonic() + BOUND
        prove(other, port, lambda: turn_once(loop, until))
        other.send(encode(OTHER))
        lines: list[bytes] = []
        while len(lines) < 2:  # the answer, and the first sign of life
            turn_once(loop, until)
            lines += other.receive()
        assert [decode(line) for line in lines] == [JoinPending(), JoinPending()]


def test_a_closed_server_is_called_no_longer() -> None:
    with serving() as (loop, server, _):
        server.close()
        begun = time.monotonic()
        loop.turn(begun + 0.1 + KEEPALIVE_S)
        assert time.monotonic() - begun > KEEPALIVE_S
