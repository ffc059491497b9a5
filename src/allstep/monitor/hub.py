"""The monitor of a whole world: all ranks report to it, each by itself or through the relay of its node.

Contract: that of `service.Service`. Any loop drives it: the launcher's, a sidecar's, a test's. What comes in
goes three ways. `Admission` lets the ranks go on when all have come and fit. `NodeLinks` keeps the relays of other
nodes. `FailureDetector` is told what ranks report, and comes to at most one `Verdict`. A world that was closed in order
may be opened again by the same processes.

The driver of a hub without a supervisor may be ended by a scheduler right behind the last rank of its node. So
`foretell` tells the relays of a rank's end before anything else, and once the last one ends the report is left to
another node, the `reporter`: it gets the text with the order to leave, or writes what it knows where neither comes. All
relays always know which node that is.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from allstep.diagnosis.record import ProcessActivity
from allstep.diagnosis.root_cause import Diagnosis
from allstep.monitor.admission import Admission
from allstep.monitor.driven_clock import DrivenClock
from allstep.monitor.failure_detector import FailureDetector
from allstep.monitor.node_links import NodeLinks
from allstep.monitor.service import ConnectionLost, MonitorEvent, MonitorSettings
from allstep.monitor.silent_ranks import SilentRanks
from allstep.protocol.connection import Connection
from allstep.protocol.messages import (
    AskStacks,
    CheckpointSaved,
    Failure,
    FailureCaught,
    Finish,
    Goodbye,
    Heartbeat,
    Leave,
    Message,
    NodeHeartbeat,
    NodeHello,
    NodeRemark,
    Notice,
    ProcessSeen,
    RankEnding,
    RankHello,
    RankLost,
    Stacks,
    WorkerEnded,
    encode,
)
from allstep.protocol.registration import RankRegistration
from allstep.protocol.server import (
    Happening,
    MessageServer,
    Peer,
    PeerConnected,
    PeerGone,
    PeerMessage,
    same_attempt,
)
from allstep.protocol.worker_exit import WorkerExit

_PERIOD = 1.0  # between two looks at progress, and two heartbeats to relays


class Hub:
    """The monitor of a whole world."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        settings: MonitorSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to serve.

        Args:
            selector: the driver's.
            listener: a listening socket, the hub's from now on.
            settings: what is watched, and how.
            clock: seconds, never turned back.
        """
        self._clock = DrivenClock(clock)
        self._events: list[MonitorEvent] = []
        world_size, limits = settings.world_size, settings.limits
        admits = same_attempt(settings.attempt)
        self._server = MessageServer(selector, listener, self, key=settings.key, admits=admits, clock=clock)
        self._detector = FailureDetector(
            world_size,
            attempt=settings.attempt,
            supervised=settings.supervised,
            limits=limits,
            clock=self._clock,
            events=self._events,
            ask_stacks=self._ask_stacks,
        )
        self._links = NodeLinks(world_size, limits.link, self._clock)
        self._admission = Admission(self._server, self._detector, world_size, clock, self._events)
        self._introduced, self._remark, self._saved = settings.introduced, settings.remark, settings.saved
        self._supervised = settings.supervised
        self.goodbyes = 0  # that ranks have said
        self._silent = SilentRanks(self.connection, self._clock.age)
        self._foretold: dict[int, WorkerExit] = {}  # of ranks behind relays
        self._is_left = False  # by all ranks of its own node
        self._reporter = -1  # the node that writes the report where this one cannot; -1: there is none
        self._order: Leave | None = None  # what all were told, and late comers are
        self._tick_at = clock() + _PERIOD
        self._finished = False

    # What the driver does.

    def expect_node(self, node_rank: int, ranks: Collection[int] | None = None) -> None:
        """Let a node connect; all others are refused.

        Args:
            node_rank: which node.
            ranks: its ranks, where they are known. Then it is lost if it does not connect within twice the limit for
                links.
        """
        self._links.expect(node_rank, ranks)

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        self._clock.driven()
        self._server.ready(key)
        self._handle()

    def deadline(self) -> float:
        """When `tick` is due, on the clock."""
        times = (self._server.deadline(), self._admission.deadline(), self._detector.deadline(), self._tick_at)
        return min(at for at in times if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        self._clock.driven()
        now = self._clock.now()
        self._server.tick()
        if now >= self._tick_at:
            self._tick_at = now + _PERIOD
            self._keep_links()
            self._detector.awaited(self._admission.missing)
            self._look_at_processes()
            self._detector.watch_progress(self._links.unheard())
        self._detector.tick()
        self._handle()

    def foretell(self, end: WorkerExit) -> None:
        """Tell every relay how a rank of this node ends."""
        record = self._detector.records[end.rank]
        if self._supervised or record.registration is None or not self._detector.is_news(end):
            return
        direct = {rank for rank, peer in self._admission.peers.items() if peer not in self._links}
        self._is_left = direct <= {end.rank}
        last = record.heartbeat
        place = (last.epoch, last.iteration, last.section) if last else (0, 0, "")
        line = encode(RankEnding(end, replace(record.registration, facts={}), *place))
        for peer in self._links:
            self._server.send(peer, line)

    def worker_ended(self, end: WorkerExit) -> None:
        """Take note of how a worker ended."""
        self._detector.ended(end)
        self._detector.awaited(self._admission.missing)

    def take(self) -> list[MonitorEvent]:
        """What happened since the last call, in order."""
        events = self._events.copy()
        self._events.clear()  # the list itself is shared with those that add to it
        return events

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order all ranks to leave, but for those that are on their way out with an exception of their own."""
        spared = self._detector.order_leave()
        self._order = Leave(reason, code, printer=-1 if printer is None else printer, spared=spared)
        # Those that wait for others too, and not only those that were let in: they would wait in vain.
        for peer in self._admission.connections() - set(self._links):
            text = report if report and peer.rank == printer else ""
            self._server.send(peer, encode(Leave(reason, None if peer.rank in spared else code, text)))
        for peer in self._links:
            leads = printer is None and self._links.node(peer) == self._reporter
            writes = leads or printer in self._links.ranks(peer)
            text = report if report and writes else ""
            self._server.send(peer, encode(replace(self._order, report=text)))
        self._handle()

    def notify(self, text: str, printer: int) -> None:
        """Have a rank write a line to standard error."""
        peer = self._admission.peers.get(printer)
        if peer is not None:
            self._server.send(peer, encode(Notice(text, printer)))

    def finish(self, text: str, code: int) -> None:
        """Tell every relay that the attempt is over."""
        self._finished = True
        for peer in self._links:
            self._server.send(peer, encode(Finish(text, code)))

    def close(self) -> None:
        """Let go of all sockets and processes."""
        self._silent.close()
        self._server.close()

    # What is known.

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent; a driver that ends may give them a moment."""
        return sum(peer.connection.backlog for peer in {*self._admission.peers.values(), *self._links})

    @property
    def connected(self) -> int:
        """How many ranks and relays are connected."""
        return len(self._admission.connections().union(self._links))

    @property
    def undecided(self) -> bool:
        """Whether something is known that may still become a verdict."""
        return self._detector.undecided

    def progress(self) -> tuple[int, int]:
        """The furthest (epoch, iteration) that any rank reached."""
        return self._detector.furthest

    def status(self, rank: int) -> Heartbeat | None:
        """The last heartbeat of a rank."""
        return self._detector.records[rank].heartbeat

    def ends(self) -> Mapping[int, WorkerExit]:
        """How workers ended, by rank."""
        return self._detector.ends()

    @property
    def writes_report(self) -> bool:
        """Whether its driver writes the report: not where its own ranks have ended, and another node is there."""
        return not (self._is_left and self._reporter >= 0)

    def leaving_codes(self) -> dict[int, int]:
        """The exit status that each rank foretold which has said goodbye; 0 where it foretold none."""
        return {rank: record.leaving_code for rank, record in self._detector.records.items() if record.goodbye}

    def present(self) -> list[int]:
        """The ranks whose World is open, as far as is known."""
        return self._detector.present()

    def registrations(self) -> dict[int, RankRegistration]:
        """How each rank that came introduced itself."""
        return {rank: record.registration for rank, record in self._detector.records.items() if record.registration}

    def connection(self, rank: int) -> Connection | None:
        """The connection of a rank that reports to this very service; None where a relay, or nothing, is between."""
        peer = self._admission.peers.get(rank)
        return None if peer is None or peer in self._links else peer.connection

    def diagnosis(self) -> Diagnosis | None:
        """The diagnosis as it stands now: the cause of the verdict, and what has become of the others since."""
        return self._detector.diagnosis()

    # What peers send.

    def _handle(self) -> None:
        """Act on what came in, and on what that leads to."""
        self._server.handle(self._act)
        self._admission.decide()

    def _act(self, happening: Happening) -> None:
        match happening:
            case PeerConnected(peer, RankHello() as hello):
                peer.rank = hello.registration.rank
                if self._introduced is not None:
                    self._introduced(hello.registration, peer.connection)
                self._arrive(hello, peer)
            case PeerConnected(peer, NodeHello() as hello):
                if objection := self._links.objection(hello):
                    self._server.refuse(peer, objection)
                else:
                    self._links.connected(peer, hello)
                    self._choose_reporter()
                    self._server.send(peer, encode(NodeHeartbeat(self._reporter)))
            case PeerMessage(peer, message) if peer in self._links:
                self._from_relay(peer, self._links.heard(peer), message)
            case PeerMessage(peer, message):
                self._from_rank(peer, peer.rank, message)
            case PeerGone(peer, why) if peer in self._links:
                self._lose_relay(peer, why)
            case PeerGone(peer, why):
                self._admission.close_peer(peer, why)
                if peer.rank is not None and self._detector.is_lost(peer.rank):
                    self._events.append(ConnectionLost(peer.rank))

    def _arrive(self, hello: RankHello, peer: Peer) -> None:
        if self._order is not None:
            self._server.send(peer, encode(self._order))
        else:
            self._admission.arrive(hello, peer)

    def _from_relay(self, peer: Peer, ranks: Collection[int], message: Message) -> None:
        match message:
            case RankHello() if message.registration.rank in ranks:
                self._arrive(message, peer)
            case RankEnding(end) if end.rank in ranks:
                self._foretold[end.rank] = end
            case WorkerEnded(end) if end.rank in ranks:
                self.worker_ended(end)
            case NodeRemark(rank, text) if rank in ranks:
                self._detector.remarked(rank, text)
            case ProcessSeen(rank, activity) if rank in ranks and activity in set(ProcessActivity):
                self._detector.seen(rank, ProcessActivity(activity))
            case RankLost(rank, why) if rank in ranks:
                self._admission.lose_rank(rank, peer, why)
            case Heartbeat() | Failure() | Stacks() | Goodbye() | FailureCaught() if message.rank in ranks:
                self._from_rank(peer, message.rank, message)

    def _from_rank(self, peer: Peer, rank: int | None, message: Message) -> None:
        """Something from a rank, which may report only of itself, and only once it was let in."""
        if rank is None or self._admission.peers.get(rank) is not peer or getattr(message, "rank", None) != rank:
            return
        match message:
            case Heartbeat():
                self._detector.beat(message)
            case Failure():
                if self._remark is not None and peer not in self._links and not message.derived:
                    self._detector.remarked(rank, self._remark())
                self._detector.failed(message)
            case Stacks():
                self._detector.answered(message)
            case CheckpointSaved():
                if self._saved is not None:
                    self._saved(message)
            case Goodbye(_, closed, code):
                self.goodbyes += 1
                self._detector.said_goodbye(rank, closed=closed, code=code)
                if peer in self._links and self._links.node(peer) == self._reporter:
                    self._choose_reporter()
            case FailureCaught():
                self._detector.caught(rank)

    def _lose_relay(self, peer: Peer, why: str, *, silent: bool = False) -> None:
        ranks, what = self._links.lose(peer, why)
        self._choose_reporter()
        self._admission.lose_relay(peer)
        for rank in self._foretold.keys() & set(ranks):
            self.worker_ended(self._foretold.pop(rank))
        self._lose_node(ranks, what, silent=silent)

    def _lose_node(self, ranks: Collection[int], what: str, *, silent: bool) -> None:
        # A relay also goes when the attempt is over, or when its ranks were refused: that is no failure.
        if self._finished or self._admission.refusal:
            return
        # The system of a machine that closes a connection is there: it is the service that ended. A scheduler ends it
        # right behind the node's last rank, and can be faster than what it had to say.
        if len(ranks) == 1 and not silent and not self._supervised:
            self._detector.gone_with_service(next(iter(ranks)), what)
        else:
            self._detector.node_lost(ranks, what)

    def _choose_reporter(self) -> None:
        """Tell all relays which node reports where this one cannot, if that is another one than before."""
        before, self._reporter = self._reporter, self._links.reporter(self._detector.present())
        if self._reporter != before:
            self._send_heartbeats()

    def _send_heartbeats(self) -> None:
        for peer in self._links:
            self._server.send(peer, encode(NodeHeartbeat(self._reporter)))

    def _keep_links(self) -> None:
        self._choose_reporter()
        self._send_heartbeats()
        if not self._finished:
            for peer, why in self._links.silent():
                self._lose_relay(peer, why, silent=True)
            for ranks, what in self._links.absent():
                self._lose_node(ranks, what, silent=True)

    def _ask_stacks(self) -> None:
        for peer in dict.fromkeys(self._admission.peers.values()):  # a relay asks all of its ranks
            self._server.send(peer, encode(AskStacks()))
        self._look_at_processes(everyone=True)

    def _look_at_processes(self, *, everyone: bool = False) -> None:
        for rank, activity in self._silent.look(self._detector.records.values(), everyone=everyone):
            self._detector.seen(rank, activity)
