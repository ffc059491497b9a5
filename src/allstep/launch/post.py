"""The head's door: where the supervisors of the other nodes come before each attempt, and when the run is over.

Contract: lives as long as the run, on the rendezvous port, driven by the run's loop. Between attempts it gathers:
`missing` names the nodes that are not there, `objection` is why the run cannot go on at all. `start` lets all go.
During an attempt a node that comes is one whose workers have ended already, and waits; any other is refused. `over`
tells those that wait that the run has ended. A stranger is turned away and said once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from allstep.channel.listening import EVERYWHERE, listen
from allstep.errors import LaunchError
from allstep.launch.joining import Gone, Join, Over, Refused, Roster, Start, Waiting, decode
from allstep.launch.loop import Loop
from allstep.launch.wire import Wire

PULSE = 2.0
"""Seconds between two signs of life for nodes that wait."""

_INTRODUCTION = 10.0


def open_door(ports: Iterable[int]) -> socket.socket:
    """Listen on the first port that is free, on every interface.

    Raises:
        LaunchError: all are in use; the message names them.
    """
    problems: list[str] = []
    for port in ports:
        try:
            return listen(EVERYWHERE, port)
        except OSError as error:
            problems.append(f"{port} ({os.strerror(error.errno or 0)})")
    raise LaunchError(
        f"node 0 cannot listen for the other nodes on port {', '.join(problems)}; end what holds it, which may be "
        "another node 0 of this run, or choose another port for --rdzv on all nodes"
    )


class Post:
    """The door and who waits at it.

    Args:
        loop: the run's loop.
        listener: what `open_door` gave.
        own: the head's own introduction.
        say: called with what a person should know.
    """

    def __init__(self, loop: Loop, listener: socket.socket, own: Join, say: Callable[[str], None]) -> None:
        self.objection = ""
        self._loop = loop
        self._listener = listener
        self._roster = Roster(own)
        self._waiting: dict[int, Wire] = {}
        self._unknown: dict[Wire, float] = {}
        self._members: dict[int, str] | None = None
        self._away: set[int] = set()
        self._told: set[str] = set()
        self._say = say
        self._next_pulse = time.monotonic() + PULSE
        listener.setblocking(False)
        loop.watch(listener.fileno(), self._accept)

    def missing(self) -> tuple[int, ...]:
        """The node ranks that have not come."""
        return self._roster.missing()

    def roster(self) -> Roster:
        """Who has come."""
        return self._roster

    def deadline(self) -> float:
        """When `pulse` is to be called next."""
        return self._next_pulse

    def pulse(self) -> None:
        """Give those that wait a sign of life, and drop who never said who it is."""
        now = time.monotonic()
        if now < self._next_pulse:
            return
        self._next_pulse = now + PULSE
        for node, wire in list(self._waiting.items()):
            try:
                wire.send(Waiting())
            except ConnectionError:
                self._lose(node)
        for wire, since in list(self._unknown.items()):
            if now - since > _INTRODUCTION:
                self._drop(wire)

    def start(self, starts: Mapping[int, Start]) -> None:
        """Let every node but the head's own go, and remember who they are."""
        self._members = {node: join.process for node, join in self._roster.joined.items()}
        self._away = set(starts)
        for node, start in starts.items():
            with contextlib.suppress(ConnectionError):
                self._waiting[node].send(start)
            self._lose(node)

    def gather(self) -> None:
        """Begin to wait for the nodes of the next attempt."""
        self._members = None

    def away(self) -> tuple[int, ...]:
        """Nodes that were let go and have not come back."""
        return tuple(sorted(self._away))

    def over(self, message: Over | Refused) -> None:
        """Tell those that wait that there is nothing more to come."""
        for node, wire in list(self._waiting.items()):
            with contextlib.suppress(ConnectionError):
                wire.send(message)
            self._lose(node)

    def close(self) -> None:
        """Close the door and every connection."""
        for wire in [*self._waiting.values(), *self._unknown]:
            self._loop.forget(wire.fileno())
            wire.close()
        self._loop.forget(self._listener.fileno())
        self._listener.close()

    def _accept(self) -> None:
        try:
            wire = Wire(self._listener.accept()[0])
        except OSError:
            return
        self._unknown[wire] = time.monotonic()
        self._loop.watch(wire.fileno(), partial(self._hear, wire))

    def _hear(self, wire: Wire) -> None:
        try:
            for line in wire.receive():
                message = decode(line)
                if isinstance(message, Gone) and not self._roster.is_stranger(message):
                    self.objection = f"node {message.node_rank} left: {message.reason}"
                    self._away.discard(message.node_rank)
                elif isinstance(message, Join) and wire in self._unknown:
                    self._admit(wire, message)
                else:
                    raise LaunchError("not a node that joins")
        except (ConnectionError, LaunchError):
            self._drop(wire)

    def _admit(self, wire: Wire, join: Join) -> None:
        if self._roster.is_stranger(join):
            self._refuse(wire, self._roster.turned_away(join), stranger=True)
            self._say_once(f"turned away {join.process}, which wanted to join run {join.run!r} here")
            return
        if self._members is not None and self._members.get(join.node_rank) != join.process:
            there = self._members.get(join.node_rank, "nobody")
            self._refuse(wire, f"the run has begun already, and node {join.node_rank} of it is {there}")
            self._say_once(f"turned away {join.process}, which wanted to be node {join.node_rank}: that is {there}")
            return
        if objection := self._roster.objection(join):
            self.objection = objection
            self._refuse(wire, objection)
            return
        if join.node_rank in self._waiting:  # the same process once more, over a new connection
            self._lose(join.node_rank)
        del self._unknown[wire]
        self._waiting[join.node_rank] = wire
        self._roster.joined[join.node_rank] = join
        self._away.discard(join.node_rank)
        with contextlib.suppress(ConnectionError):
            wire.send(Waiting())

    def _refuse(self, wire: Wire, reason: str, *, stranger: bool = False) -> None:
        with contextlib.suppress(ConnectionError):
            wire.send(Refused(reason, stranger))
        self._drop(wire)

    def _drop(self, wire: Wire) -> None:
        node = next((node for node, each in self._waiting.items() if each is wire), None)
        if node is not None:
            self._lose(node)
        elif self._unknown.pop(wire, None) is not None:
            self._loop.forget(wire.fileno())
            wire.close()

    def _lose(self, node: int) -> None:
        wire = self._waiting.pop(node)
        self._roster.joined.pop(node, None)
        self._loop.forget(wire.fileno())
        wire.close()

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)
