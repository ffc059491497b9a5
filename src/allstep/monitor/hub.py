"""The service that a world's ranks report to, as an object that any loop drives.

Contract: that of `service.Service`. It turns away who does not belong here (`gate`), lets the ranks go on when all have
arrived and fit (`admission`), keeps the relays of other nodes (`links`), and passes what ranks report to its
`FailureDetector`, which comes to at most one `Verdict`. A world that was closed in order may be opened again by the
same processes.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from allstep.diagnosis.hang import Limits
from allstep.diagnosis.root_cause import Diagnosis
from allstep.monitor.admission import Admission
from allstep.monitor.failure_detector import FailureDetector
from allstep.monitor.node_links import Links, Node
from allstep.monitor.service import HubEvent
from allstep.protocol.messages import (
    CODEC,
    AskStacks,
    Beat,
    Bye,
    Failure,
    Finish,
    Hello,
    Leave,
    Message,
    NodeBeat,
    NodeHello,
    Notice,
    RankLost,
    Stacks,
    Withdraw,
    WorkerEnded,
    encode,
)
from allstep.protocol.registration import Registration
from allstep.protocol.server import Came, Gone, MessageServer, Peer, Said, who_knows
from allstep.protocol.worker_exit import WorkerExit

_PERIOD = 1.0


class Hub:
    """The service of a whole world."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        *,
        nonce: str,
        attempt: int,
        world_size: int,
        limits: Limits,
        supervised: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to serve.

        Args:
            selector: the driver's.
            listener: a listening socket, the hub's from now on.
            nonce: what every rank has to know.
            attempt: the present start's number.
            world_size: how many ranks there are.
            limits: how long sections may last.
            supervised: the driver will call `worker_ended` for every rank, so that a closed connection is not yet
                an end; false where a closed connection is the only news there will be.
            clock: seconds, never turned back.
        """
        self._clock = clock
        self._events: list[HubEvent] = []
        self._gate = MessageServer(selector, listener, self, codec=CODEC, admits=who_knows(nonce, attempt), clock=clock)
        self._inquiry = FailureDetector(
            world_size,
            attempt=attempt,
            supervised=supervised,
            limits=limits,
            clock=clock,
            events=self._events,
            ask_stacks=self._ask_stacks,
        )
        self._links = Links(world_size, limits.link, clock, self._inquiry.watch.age)
        self._admission = Admission(self._gate, self._inquiry, world_size, clock, self._events)
        self._told: Leave | None = None
        self._tick_at = clock() + _PERIOD
        self._finished = False

    def expect_node(self, node_rank: int, ranks: Collection[int]) -> None:
        """A node with these ranks will connect; if it does not within twice the limit for links, it is lost."""
        self._links.expect(node_rank, ranks)

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        self._inquiry.watch.driven()
        self._gate.ready(key)
        self._hear()

    def deadline(self) -> float:
        """When `tick` is due, on the clock."""
        times = (self._gate.deadline(), self._admission.deadline(), self._inquiry.deadline(), self._tick_at)
        return min(at for at in times if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        self._inquiry.watch.driven()
        now = self._clock()
        self._gate.tick()
        if now >= self._tick_at:
            self._tick_at = now + _PERIOD
            self._keep_links()
            self._inquiry.awaited(self._admission.missing)
            self._inquiry.watch_progress(self._links.away())
        self._inquiry.tick()
        self._hear()

    def worker_ended(self, end: WorkerExit) -> None:
        """Take note of how a worker ended."""
        self._inquiry.ended(end)
        self._inquiry.awaited(self._admission.missing)

    def take(self) -> list[HubEvent]:
        """What happened since the last call, in order."""
        events = self._events.copy()
        self._events.clear()
        return events

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order all ranks to leave, but for those that are on their way out with an exception of their own."""
        spared = self._inquiry.order_leave()
        self._told = Leave(reason, code, printer=-1 if printer is None else printer, spared=spared)
        for door in self._admission.everybody() - set(self._links):
            text = report if report and door.name == printer else ""
            self._gate.send(door, encode(Leave(reason, None if door.name in spared else code, text)))
        for door in self._links:
            text = report if report and printer in self._links.ranks(door) else ""
            self._gate.send(door, encode(replace(self._told, report=text)))
        self._hear()

    def notify(self, text: str, printer: int) -> None:
        """Have a rank write a line to standard error."""
        door = self._admission.doors.get(printer)
        if door is not None:
            self._gate.send(door, encode(Notice(text, printer)))

    def finish(self, text: str, code: int) -> None:
        """Tell every relay that the attempt is over."""
        self._finished = True
        for door in self._links:
            self._gate.send(door, encode(Finish(text, code)))

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent; a driver that ends may give them a moment."""
        return sum(door.connection.backlog for door in {*self._admission.doors.values(), *self._links})

    @property
    def connected(self) -> int:
        """How many ranks and relays are connected."""
        return len(self._admission.everybody().union(self._links))

    @property
    def settling(self) -> bool:
        """Whether something is known that may still become a verdict."""
        return self._inquiry.settling

    def progress(self) -> tuple[int, int]:
        """The furthest (epoch, iteration) that any rank reached."""
        return self._inquiry.furthest

    def status(self, rank: int) -> Beat | None:
        """The last heartbeat of a rank."""
        return self._inquiry.records[rank].beat

    def ends(self) -> Mapping[int, WorkerExit]:
        """How workers ended, by rank."""
        return self._inquiry.ends()

    def present(self) -> list[int]:
        """The ranks whose World is open, as far as is known."""
        return self._inquiry.present()

    def arrivals(self) -> dict[int, Registration]:
        """How each rank that came introduced itself."""
        return {rank: record.arrival for rank, record in self._inquiry.records.items() if record.arrival}

    def case(self) -> Diagnosis | None:
        """The case as it stands now: the cause of the verdict, and what has become of the others since."""
        return self._inquiry.case()

    def close(self) -> None:
        """Let go of all sockets."""
        self._gate.close()

    def _hear(self) -> None:
        """Act on what came through the gate, and on what that leads to."""
        while happened := self._gate.take():
            for each in happened:
                match each:
                    case Came(peer, Hello() as hello):
                        peer.name = hello.arrival.rank
                        self._arrive(hello, peer)
                    case Came(peer, NodeHello() as hello):
                        self._links.came(peer, hello)
                    case Said(peer, message) if peer in self._links:
                        self._say_node(peer, self._links.heard(peer), message)
                    case Said(peer, message):
                        self._say(peer, peer.name, message)
                    case Gone(peer, why) if peer in self._links:
                        self._lose_node(peer, why)
                    case Gone(peer, why):
                        self._admission.close_door(peer, why)
        self._admission.decide()

    def _arrive(self, hello: Hello, peer: Peer) -> None:
        if self._told is not None:
            self._gate.send(peer, encode(self._told))
        else:
            self._admission.arrive(hello, peer)

    def _say_node(self, peer: Peer, node: Node, message: Message) -> None:
        match message:
            case Hello():
                self._arrive(message, peer)
            case WorkerEnded(end) if end.rank in node.ranks:
                self.worker_ended(end)
            case RankLost(rank, why) if rank in node.ranks:
                self._admission.lose_rank(rank, peer, why)
            case Beat() | Failure() | Stacks() | Bye() | Withdraw() if message.rank in node.ranks:
                self._say(peer, message.rank, message)

    def _say(self, peer: Peer, rank: int | None, message: Message) -> None:
        """Something from a rank, which may speak only for itself, and only once it was let in."""
        if rank is None or self._admission.doors.get(rank) is not peer or getattr(message, "rank", None) != rank:
            return
        match message:
            case Beat():
                self._inquiry.beat(message)
            case Failure():
                self._inquiry.failed(message)
            case Stacks():
                self._inquiry.answered(message)
            case Bye(_, closed):
                self._inquiry.said_goodbye(rank, closed=closed)
            case Withdraw():
                self._inquiry.withdrew(rank)

    def _lose_node(self, peer: Peer, why: str) -> None:
        ranks, what = self._links.lose(peer, why)
        self._admission.lose_relay(peer)
        self._node_lost(ranks, what)

    def _node_lost(self, ranks: Collection[int], what: str) -> None:
        if not self._finished and not self._admission.refusal:
            self._inquiry.node_lost(ranks, what)

    def _keep_links(self) -> None:
        for peer in self._links:
            self._gate.send(peer, encode(NodeBeat()))
        if not self._finished:
            for peer, why in self._links.silent():
                self._lose_node(peer, why)
            for ranks, what in self._links.absent():
                self._node_lost(ranks, what)

    def _ask_stacks(self) -> None:
        for door in dict.fromkeys(self._admission.doors.values()):
            self._gate.send(door, encode(AskStacks()))
