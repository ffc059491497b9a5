"""The door for other machines, while an attempt runs: nobody but the loop drives it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from allstep.launch.event_loop import EventLoop
from allstep.launch.join_protocol import CODEC, Join, Waiting, token
from allstep.launch.join_server import PULSE, JoinServer
from allstep.protocol.connection import Connection

BOUND = 10.0  # seconds
HEAD = Join("exp", token("exp", ""), 2, 0, 1, "h0", 10, {})
OTHER = Join("exp", token("exp", ""), 2, 1, 1, "h1", 11, {})


@contextlib.contextmanager
def door() -> Iterator[tuple[EventLoop, JoinServer, int]]:
    loop = EventLoop()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with contextlib.closing(loop), contextlib.closing(JoinServer(loop, listener, HEAD, lambda text: None)) as post:
        yield loop, post, port


def connect(port: int) -> Connection:
    return Connection(socket.create_connection(("127.0.0.1", port), timeout=BOUND))


def turn_once(loop: EventLoop, until: float) -> None:
    assert time.monotonic() < until, f"not within {BOUND} s"
    loop.turn(until)


def test_who_never_says_who_it_is_is_closed_on_during_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allstep.protocol.server.HELLO_S", 0.3)
    with door() as (loop, post, port), contextlib.closing(connect(port)) as stranger:
        post.start({})
        until = time.monotonic() + BOUND
        while not stranger.ended:
            turn_once(loop, until)
            stranger.receive()


def test_a_node_that_waits_during_an_attempt_gets_signs_of_life() -> None:
    with door() as (loop, _, port), contextlib.closing(connect(port)) as other:
        other.send(CODEC.encode(OTHER))
        until = time.monotonic() + BOUND
        lines: list[bytes] = []
        while len(lines) < 2:  # the answer, and the first sign of life
            turn_once(loop, until)
            lines += other.receive()
        assert [CODEC.decode(line) for line in lines] == [Waiting(), Waiting()]


def test_a_door_that_is_closed_is_tended_no_longer() -> None:
    with door() as (loop, post, _):
        post.close()
        begun = time.monotonic()
        loop.turn(begun + 0.1 + PULSE)
        assert time.monotonic() - begun > PULSE
