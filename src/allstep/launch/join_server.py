"""Node 0's side of joining: other machines come here before each attempt, and hear here that the run is over.

`JoinServer` lives as long as the run, on the rendezvous port, and the run's loop drives it, attempt or not. Between
attempts it gathers: `nodes` has who came, and `objection` is why the run cannot go on at all. `start` lets all begin.
During an attempt it takes only machines of the run, whose workers have ended already, and lets them wait. `over` tells
those that wait that the run has ended. Who does not have the run's key is turned away, and said to be once.

`NodeAssembly` is what `head` asks. It is made before anything is started. `complete` waits until every machine has
come and returns "", or why they cannot start, after telling those that wait. `start` hands out their shares. `over`
waits a moment for machines that have not come back.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping

from allstep.errors import ConfigurationError, LaunchError
from allstep.launch.event_loop import EventLoop
from allstep.launch.join_protocol import JoinedNodes, attempt_key, introduce, run_key
from allstep.launch.machine import Machine
from allstep.launch.settings import shown_ranks
from allstep.launch.worker_plan import Share
from allstep.monitor.hub import Hub
from allstep.protocol.address import EVERYWHERE, listen, new_key
from allstep.protocol.foreign_text import one_line
from allstep.protocol.messages import (
    AttemptStart,
    JoinPending,
    JoinRequest,
    NodeResigned,
    Refused,
    RunOver,
    encode,
)
from allstep.protocol.preflight_messages import PreflightOrder
from allstep.protocol.server import (
    Happening,
    MessageServer,
    Peer,
    PeerConnected,
    PeerGone,
    PeerMessage,
    StrangerLeft,
)

KEEPALIVE_S = 2.0
"""Seconds between two messages to machines that wait, so that they know that node 0 is there."""

_NAMED = 16  # missing machines in one message
_SAID = 32  # different machines that were turned away and are told of


def open_listener(ports: Iterable[int]) -> socket.socket:
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
    """The rendezvous port, and the machines that wait there.

    Args:
        loop: the run's loop.
        listener: what `open_listener` gave.
        key: the run's.
        own: the head's own introduction.
        say: called with what a person should know.

    Attributes:
        nodes: who has come for the next attempt.
        objection: why the run cannot go on; empty where it can.
    """

    def __init__(
        self, loop: EventLoop, listener: socket.socket, key: str, own: JoinRequest, say: Callable[[str], None]
    ) -> None:
        self.nodes = JoinedNodes(own)
        self.objection = ""
        self._server = MessageServer(loop.selector, listener, self, key=key, admits=_joins, clock=time.monotonic)
        self._waiting: dict[int, Peer] = {}
        self._members: dict[int, str] | None = None  # who takes part in the attempt that runs, if one does
        self._away: set[int] = set()
        self._said: set[str] = set()
        self._say = say
        self._hear: Callable[[int, bytes], None] | None = None
        self._keepalive_at = time.monotonic() + KEEPALIVE_S
        self._loop = loop
        loop.add_timer(self)

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the loop found ready."""
        self._server.ready(key)
        self._handle()

    def deadline(self) -> float:
        """When `tick` is to be called next."""
        at = self._server.deadline()
        return self._keepalive_at if at is None else min(at, self._keepalive_at)

    def tick(self) -> None:
        """Tell machines that wait that node 0 is there, and drop who never introduced itself."""
        self._server.tick()
        now = time.monotonic()
        if now >= self._keepalive_at:
            self._keepalive_at = now + KEEPALIVE_S
            for peer in list(self._waiting.values()):
                self._server.send(peer, encode(JoinPending()))
        self._handle()

    def start(self, starts: Mapping[int, AttemptStart]) -> None:
        """Let every machine but the head begin, and remember who they are."""
        self._members = {node: request.process for node, request in self.nodes.requests.items()}
        self._away = set(starts)
        for node, start in starts.items():
            self._answer(node, start)

    def hear(self, hear: Callable[[int, bytes], None] | None) -> None:
        """Have what machines say in a preflight given to `hear`, with the node's rank; None ends it."""
        self._hear = hear

    def order(self, node: int, order: PreflightOrder) -> bool:
        """Send an order to a machine that waits; false where it does not."""
        if node in self._waiting:
            self._server.send(self._waiting[node], encode(order))
        return node in self._waiting

    def addresses(self) -> dict[int, str]:
        """The addresses from which machines that wait have come."""
        return {node: peer.host for node, peer in self._waiting.items()}

    def leave_out(self, nodes: frozenset[int], message: RunOver) -> None:
        """Go on without some machines, and tell them so."""
        for node in nodes & self._waiting.keys():
            self._answer(node, message)
        self.nodes.leave_out(nodes)

    def gather(self) -> None:
        """Begin to wait for the machines of the next attempt."""
        self._members = None

    def away(self) -> tuple[int, ...]:
        """Nodes that began an attempt and have not come back."""
        return tuple(sorted(self._away))

    def over(self, message: RunOver | Refused) -> None:
        """Tell those that wait that there is nothing more to come."""
        for node in list(self._waiting):
            self._answer(node, message)

    def close(self) -> None:
        """Close the port and every connection."""
        self._loop.remove_timer(self)
        self._server.close()

    def _handle(self) -> None:
        self._server.handle(self._act)

    def _act(self, happening: Happening) -> None:
        match happening:
            case PeerConnected(peer, JoinRequest() as request):
                self._admit(peer, request)
            case PeerConnected(peer, NodeResigned() as message):
                self._note_resigned(peer, message)
            case PeerMessage(peer, _, line) if self._hear is not None and (node := self._node_of(peer)) is not None:
                self._hear(node, line)
            case PeerMessage(peer):
                self._server.refuse(peer, "a node says who it is, and then waits")
                self._forget(peer)
            case PeerGone(peer):
                self._forget(peer)
            case StrangerLeft(host):
                self._say_once(f"turned away a process on {host}, which does not have this run's key")

    def _note_resigned(self, peer: Peer, message: NodeResigned) -> None:
        self.objection = one_line(f"node {message.node_rank} left: {message.reason}")
        self._away.discard(message.node_rank)
        self._server.send_last(peer, b"")

    def _admit(self, peer: Peer, request: JoinRequest) -> None:
        node = request.node_rank
        if self._members is not None and self._members.get(node) != request.process:
            there = self._members.get(node, "nobody")
            self._server.refuse(peer, f"the run has begun already, and node {node} of it is {there}")
            self._say_once(f"turned away {request.process}, which wanted to be node {node}: that is {there}")
            return
        if objection := self.nodes.objection(request):
            self.objection = objection
            self._server.refuse(peer, objection)
            return
        if node in self._waiting:  # the same process once more, over a new connection
            self._server.send_last(self._waiting[node], b"")
        self._waiting[node] = peer
        self.nodes.requests[node] = request
        self._away.discard(node)
        self._server.send(peer, encode(JoinPending()))

    def _answer(self, node: int, message: AttemptStart | RunOver | Refused) -> None:
        """Give a machine that waits its last message for now; it comes again after an attempt."""
        peer = self._waiting[node]
        self._forget(peer)
        self._server.send_last(peer, encode(message))

    def _forget(self, peer: Peer) -> None:
        node = self._node_of(peer)
        if node is not None:
            del self._waiting[node]
            self.nodes.requests.pop(node, None)
            if self._hear is not None:
                self._hear(node, b"")

    def _node_of(self, peer: Peer) -> int | None:
        """Which node waits there."""
        return next((node for node, each in self._waiting.items() if each is peer), None)

    def _say_once(self, text: str) -> None:
        # A machine of another run may come every second for as long as this one lasts.
        if text not in self._said and len(self._said) < _SAID:
            self._said.add(text)
            self._say(one_line(text))


def _joins(message: object) -> str | None:
    """Whom the rendezvous port `admits`: machines that join or resign; all others are closed without a word."""
    return None if isinstance(message, JoinRequest | NodeResigned) else ""


class NodeAssembly:
    """All machines of a run, as the head sees them."""

    def __init__(self, machine: Machine) -> None:
        nodes = machine.launch.nodes
        assert nodes is not None
        self._machine = machine
        self._place = nodes
        self._limit = machine.launch.settings.rdzv_timeout
        # The key first: without one, nothing is to listen.
        self._key = run_key(machine.launch)
        listener = open_listener(nodes.ports)
        self._server = JoinServer(machine.loop, listener, self._key, introduce(machine.launch), machine.say)
        self._salt = ""

    def complete(self) -> str:
        """Wait for all machines; return why they cannot start, or "" (also where a signal to stop came)."""
        self._server.gather()
        until = time.monotonic() + self._limit
        while self._server.nodes.missing() and not self._server.objection and not self._machine.stopped():
            if time.monotonic() >= until:
                break
            self._machine.turn(until)
        refusal = self._refusal()
        if refusal or self._machine.stopped():
            self._server.over(Refused(refusal or "node 0 was stopped"))
        return "" if self._machine.stopped() else refusal

    def new_attempt_key(self) -> str:
        """Draw the key of the next attempt; `start` has the other machines derive it too."""
        self._salt = new_key()
        return attempt_key(self._key, self._salt)

    def preflight_key(self, salt: str) -> str:
        """What the machines' agents prove to each other; each machine derives it by itself."""
        return attempt_key(self._key, salt)

    def world_size(self) -> int:
        """The workers of all machines together."""
        return self._server.nodes.world_size()

    def start(self, share: Share, channel_port: int, hub: Hub) -> None:
        """Let the other machines begin an attempt of which the head's share is this, and have the hub expect them."""
        requests = self._server.nodes.requests
        firsts = {node: first for node, first in self._server.nodes.first_ranks().items() if node != 0}
        places = {node: place for place, node in enumerate(self._server.nodes.taking_part())}
        for node, first in firsts.items():
            hub.expect_node(places[node], range(first, first + requests[node].workers))
        self._server.start(
            {
                node: AttemptStart(
                    run_id=share.run_id,
                    attempt=share.attempt,
                    salt=self._salt,
                    channel_port=channel_port,
                    master_port=share.master_port,
                    first_rank=first,
                    world_size=share.world_size,
                    max_restarts=share.max_restarts,
                    node_rank=places[node],
                    nodes=len(places),
                )
                for node, first in firsts.items()
            }
        )

    def node_count(self) -> int:
        """The machines that take part."""
        return len(self._server.nodes.taking_part())

    def first_ranks(self) -> Mapping[int, int]:
        """Each node's first rank."""
        return self._server.nodes.first_ranks()

    def workers(self) -> dict[int, int]:
        """Each node's number of workers."""
        return {node: request.workers for node, request in self._server.nodes.requests.items()}

    def hosts(self) -> dict[int, str]:
        """Each node's name of itself."""
        return {node: one_line(request.host) for node, request in self._server.nodes.requests.items()}

    def addresses(self) -> dict[int, str]:
        """The addresses from which the other machines have come."""
        return self._server.addresses()

    def order(self, node: int, order: PreflightOrder) -> bool:
        """Order a machine to take a step of a preflight; false where it is gone."""
        return self._server.order(node, order)

    def hear(self, hear: Callable[[int, bytes], None] | None) -> None:
        """Whom to give what the other machines' agents say; None for nobody."""
        self._server.hear(hear)

    def leave_out(self, nodes: frozenset[int], text: str) -> None:
        """Go on without some machines; `text` is the last line on their terminals."""
        self._server.leave_out(nodes, RunOver(0, text))

    def refuse(self, reason: str) -> None:
        """Tell all machines that wait why nothing is started."""
        self._server.over(Refused(reason))

    def over(self, status: int, text: str, *, until: float) -> None:
        """Tell every machine that the run has ended, waiting for those that are on their way."""
        # Machines come back only when their own workers have ended, and must not wait in vain for the last word.
        while self._server.away() and time.monotonic() < until:
            self._machine.turn(until)
        self._server.over(RunOver(status, text))

    def close(self) -> None:
        """Give the port back."""
        self._server.close()

    def _refusal(self) -> str:
        if self._server.objection:
            return self._server.objection
        if missing := self._server.nodes.missing():
            one = len(missing) == 1
            named = ", ".join(map(str, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
            return (
                f"node{'' if one else 's'} {named} of {self._place.count} did not come within {self._limit:g} s; check "
                f"that allstep run was started there and reaches {self._place.host}, port "
                f"{', '.join(map(str, self._place.ports))}, or give --rdzv-timeout more seconds"
            )
        # Which ranks there are is known only now; before an attempt is made, --show can still be refused.
        try:
            shown_ranks(self._machine.launch.settings.show, self.world_size())
        except ConfigurationError as error:
            return str(error)
        return ""
