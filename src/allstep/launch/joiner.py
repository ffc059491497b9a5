"""A node that is not the head, on its way to it: before each attempt, and until it hears that the run is over.

Contract: `join` connects to the head, says `Join`, and returns its `Start` or `Over`; it tries again where nothing
answers yet, and tries several ports in turn where the place has several. Signals are looked at all the while. What can
go wrong: the head is not reached within the limit, or is silent for `SILENCE` seconds for so long, or refuses this
node; each is a LaunchError that says so.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Generator

from allstep.channel.messages import Refused
from allstep.channel.wire import Connection
from allstep.errors import ChannelError, LaunchError
from allstep.launch.joining import CODEC, Join, Over, Resigned, Start, Waiting
from allstep.launch.loop import Loop
from allstep.launch.nodes import Nodes

SILENCE = 15.0
"""Seconds without a sign of life from the head after which the connection is given up."""

_CONNECT = 2.0
_PAUSE = 0.25


def join(
    loop: Loop, nodes: Nodes, introduction: Join, limit: float, stopped: Callable[[], bool]
) -> Start | Over | None:
    """Come to the head and wait there.

    Args:
        loop: the run's loop.
        nodes: where the head is.
        introduction: what to say.
        limit: seconds in which the head has to be reached; when it was lost, again.
        stopped: asked between waits; true ends this with None.

    Raises:
        LaunchError: the head was not reached, or refused this node.
    """
    deadline = time.monotonic() + limit
    seen: dict[int, str] = {}
    for port in itertools.cycle(nodes.ports):
        if stopped():
            return None
        if time.monotonic() >= deadline:
            tried = "; ".join(f"port {each}: {what}" for each, what in seen.items())
            raise LaunchError(
                f"node {nodes.rank} did not reach node 0 at {nodes.host} within {limit:g} s ({tried}); check that it "
                "runs, that host and port are right, and that no firewall is between"
            )
        try:
            with (
                contextlib.closing(_connect(nodes.host, port)) as connection,
                contextlib.closing(_messages(loop, connection, stopped)) as messages,
            ):
                connection.send(CODEC.encode(introduction))
                for message in messages:
                    if isinstance(message, Start | Over):
                        return message
                    if isinstance(message, Refused):
                        if not message.stranger or len(nodes.ports) == 1:
                            raise LaunchError(f"node 0 at {nodes.host}, port {port}, refused: {message.reason}")
                        raise ConnectionError("another run's node 0")
                    deadline = time.monotonic() + limit
        except OSError as error:
            seen[port] = error.strerror or str(error)
            _pause(loop, stopped)
    raise AssertionError("a place has a port")


def leave(nodes: Nodes, message: Resigned) -> None:
    """Tell the head that this node will not come again, if the head is there to hear it."""
    for port in nodes.ports:
        with contextlib.suppress(OSError), contextlib.closing(_connect(nodes.host, port)) as connection:
            connection.send(CODEC.encode(message))


def _connect(host: str, port: int) -> Connection:
    return Connection(socket.create_connection((host, port), timeout=_CONNECT))


def _messages(
    loop: Loop, connection: Connection, stopped: Callable[[], bool]
) -> Generator[Start | Over | Refused | Waiting, None, None]:
    """What the head says, as it comes; ends when `stopped`; raises ConnectionError when it is silent or gone."""
    ready: list[bool] = []
    loop.watch(connection.sock.fileno(), lambda: ready.append(True))
    try:
        until = time.monotonic() + SILENCE
        while not stopped():
            if time.monotonic() >= until:
                raise ConnectionError(f"silent for {SILENCE:g} s")
            loop.turn(until)
            if not ready:
                continue
            ready.clear()
            for line in connection.receive():
                until = time.monotonic() + SILENCE
                try:
                    message = CODEC.decode(line)
                except ChannelError as error:
                    raise ConnectionError(str(error)) from error
                if isinstance(message, Start | Over | Refused | Waiting):
                    yield message
            if connection.ended:
                raise ConnectionError(connection.ended)
    finally:
        loop.forget(connection.sock.fileno())


def _pause(loop: Loop, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + _PAUSE
    while time.monotonic() < until and not stopped():
        loop.turn(until)
