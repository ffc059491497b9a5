"""The head's door: where the supervisors of the other nodes come before each attempt, and when the run is over.

Contract: lives as long as the run, on the rendezvous port, driven by the run's loop, attempt or not. Between attempts
it gathers: `missing` names the nodes that are not there, `objection` is why the run cannot go on at all. `start` lets
all go. During an attempt a node that comes is one whose workers have ended already, and waits; any other is refused.
`over` tells those that wait that the run has ended. A stranger is turned away and said once.

The head's side of several machines: wait until all are there, hand out their shares, and say the last word.

Contract: made before anything is started, on the rendezvous port, which it holds for the whole run. `complete` waits
until every node has come and returns "", or why they cannot start, after telling those that wait. `start` lets them
begin; `over` waits a moment for those that have not come back.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping

from allstep.errors import ConfigurationError, LaunchError
from allstep.launch.event_loop import EventLoop
from allstep.launch.join_protocol import CODEC, Join, Over, Resigned, Roster, Start, Waiting, introduce
from allstep.launch.machine import Machine
from allstep.launch.settings import shown_ranks
from allstep.launch.worker_plan import Share
from allstep.monitor.hub import Hub
from allstep.protocol.address import EVERYWHERE, listen
from allstep.protocol.messages import Refused
from allstep.protocol.server import Came, Gone, MessageServer, Peer, Said

PULSE = 2.0
"""Seconds between two signs of life for nodes that wait."""


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


class JoinServer:
    """The door and who waits at it.

    Args:
        loop: the run's loop.
        listener: what `open_door` gave.
        own: the head's own introduction.
        say: called with what a person should know.
    """

    def __init__(self, loop: EventLoop, listener: socket.socket, own: Join, say: Callable[[str], None]) -> None:
        self.objection = ""
        self._gate = MessageServer(
            loop.selector, listener, self, codec=CODEC, admits=_a_node_that_joins, clock=time.monotonic
        )
        self._roster = Roster(own)
        self._waiting: dict[int, Peer] = {}
        self._members: dict[int, str] | None = None
        self._away: set[int] = set()
        self._told: set[str] = set()
        self._say = say
        self._next_pulse = time.monotonic() + PULSE
        self._loop = loop
        loop.add_timer(self)

    def missing(self) -> tuple[int, ...]:
        """The node ranks that have not come."""
        return self._roster.missing()

    def roster(self) -> Roster:
        """Who has come."""
        return self._roster

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the loop found ready."""
        self._gate.ready(key)
        self._hear()

    def deadline(self) -> float:
        """When `tick` is to be called next."""
        at_gate = self._gate.deadline()
        return self._next_pulse if at_gate is None else min(at_gate, self._next_pulse)

    def tick(self) -> None:
        """Give those that wait a sign of life, and drop who never said who it is."""
        self._gate.tick()
        now = time.monotonic()
        if now >= self._next_pulse:
            self._next_pulse = now + PULSE
            for peer in list(self._waiting.values()):
                self._gate.send(peer, CODEC.encode(Waiting()))
        self._hear()

    def start(self, starts: Mapping[int, Start]) -> None:
        """Let every node but the head's own go, and remember who they are."""
        self._members = {node: join.process for node, join in self._roster.joined.items()}
        self._away = set(starts)
        for node, start in starts.items():
            self._part(node, start)

    def gather(self) -> None:
        """Begin to wait for the nodes of the next attempt."""
        self._members = None

    def away(self) -> tuple[int, ...]:
        """Nodes that were let go and have not come back."""
        return tuple(sorted(self._away))

    def over(self, message: Over | Refused) -> None:
        """Tell those that wait that there is nothing more to come."""
        for node in list(self._waiting):
            self._part(node, message)

    def close(self) -> None:
        """Close the door and every connection."""
        self._loop.remove_timer(self)
        self._gate.close()

    def _hear(self) -> None:
        for each in self._gate.take():
            match each:
                case Came(peer, Join() as join):
                    self._admit(peer, join)
                case Came(peer, Resigned() as message):
                    self._note_resigned(peer, message)
                case Said(peer):
                    self._gate.refuse(peer, "a node says who it is, and then waits")
                    self._forget(peer)
                case Gone(peer):
                    self._forget(peer)

    def _note_resigned(self, peer: Peer, message: Resigned) -> None:
        if not self._roster.is_stranger(message):
            self.objection = f"node {message.node_rank} left: {message.reason}"
            self._away.discard(message.node_rank)
        self._gate.part(peer, b"")

    def _admit(self, peer: Peer, join: Join) -> None:
        if self._roster.is_stranger(join):
            self._gate.refuse(peer, self._roster.turned_away(join), stranger=True)
            self._say_once(f"turned away {join.process}, which wanted to join run {join.run!r} here")
            return
        if self._members is not None and self._members.get(join.node_rank) != join.process:
            there = self._members.get(join.node_rank, "nobody")
            self._gate.refuse(peer, f"the run has begun already, and node {join.node_rank} of it is {there}")
            self._say_once(f"turned away {join.process}, which wanted to be node {join.node_rank}: that is {there}")
            return
        if objection := self._roster.objection(join):
            self.objection = objection
            self._gate.refuse(peer, objection)
            return
        if join.node_rank in self._waiting:  # the same process once more, over a new connection
            self._gate.part(self._waiting[join.node_rank], b"")
        self._waiting[join.node_rank] = peer
        self._roster.joined[join.node_rank] = join
        self._away.discard(join.node_rank)
        self._gate.send(peer, CODEC.encode(Waiting()))

    def _part(self, node: int, message: Start | Over | Refused) -> None:
        peer = self._waiting[node]
        self._forget(peer)
        self._gate.part(peer, CODEC.encode(message))

    def _forget(self, peer: Peer) -> None:
        for node, each in list(self._waiting.items()):
            if each is peer:
                del self._waiting[node]
                self._roster.joined.pop(node, None)

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)


def _a_node_that_joins(message: object) -> str | None:
    return None if isinstance(message, Join | Resigned) else ""


class NodeAssembly:
    """All machines of a run, as the head sees them."""

    def __init__(self, machine: Machine) -> None:
        nodes = machine.launch.nodes
        assert nodes is not None
        self._machine = machine
        self._nodes = nodes
        self._limit = machine.launch.settings.rdzv_timeout
        self._post = JoinServer(machine.loop, open_door(nodes.ports), introduce(machine.launch), machine.say)

    def complete(self) -> str:
        """Wait for all machines; return why they cannot start, or "" (also where a signal to stop came)."""
        self._post.gather()
        until = time.monotonic() + self._limit
        while self._post.missing() and not self._post.objection and not self._machine.stopped():
            if time.monotonic() >= until:
                break
            self._machine.turn(until)
        refusal = self._refusal()
        if refusal or self._machine.stopped():
            self._post.over(Refused(refusal or "node 0 was stopped"))
        return "" if self._machine.stopped() else refusal

    def world_size(self) -> int:
        """The workers of all machines together."""
        return self._post.roster().world_size()

    def start(self, share: Share, channel_port: int, hub: Hub) -> None:
        """Let the other machines begin an attempt of which the head's share is this, and the hub expect them."""
        roster = self._post.roster()
        firsts = roster.first_ranks()
        for node, first in firsts.items():
            if node != 0:
                hub.expect_node(node, range(first, first + roster.joined[node].workers))
        self._post.start(
            {
                node: Start(
                    run_id=share.run_id,
                    attempt=share.attempt,
                    nonce=share.nonce,
                    channel_port=channel_port,
                    master_port=share.master_port,
                    first_rank=first,
                    world_size=share.world_size,
                    max_restarts=share.max_restarts,
                )
                for node, first in firsts.items()
                if node != 0
            }
        )

    def over(self, status: int, text: str, *, until: float) -> None:
        """Tell every machine that the run has ended, waiting for those that are on their way."""
        while self._post.away() and time.monotonic() < until:
            self._machine.turn(until)
        self._post.over(Over(status, text))

    def close(self) -> None:
        """Give the port back."""
        self._post.close()

    def _refusal(self) -> str:
        if self._post.objection:
            return self._post.objection
        if missing := self._post.missing():
            one = len(missing) == 1
            named = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
            return (
                f"node{'' if one else 's'} {named} of {self._nodes.count} did not come within {self._limit:g} s; check "
                f"that allstep run was started there and reaches {self._nodes.host}, port "
                f"{', '.join(map(str, self._nodes.ports))}, or give --rdzv-timeout more seconds"
            )
        try:
            shown_ranks(self._machine.launch.settings.show, self.world_size())
        except ConfigurationError as error:
            return str(error)
        return ""
