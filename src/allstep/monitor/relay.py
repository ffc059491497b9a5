"""The monitor of a node that is not the head: its ranks connect to it, and it to the head's hub.

Contract: that of `service.Service`. What its ranks send goes on to the head in the order in which they sent it:
heartbeats collected for a moment, everything else at once. What the head sends goes to the ranks that it concerns
(`node_ranks`). Both ends of the connection (`uplink`) send a heartbeat once a second. Losing the head is a `Verdict`
here: it could not be reached, closed the connection before the attempt was over, or was silent for longer than
`limits.link`. The driver then orders the ranks to leave. No call blocks, but for resolving the head's name when the
relay is made.

A scheduler may end the head's service right behind the last rank of its node. The head then has said before how that
rank ends (`RankEnding`), which is the cause of the verdict, or was ended too soon to say even that. Its system closes
all connections at once, so all relays know, and one of them writes the report: the one that the head's heartbeats name.
A head that was not heard from may be lost to this node alone, which then writes a report of its own.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from allstep.diagnosis.rank_outcome import OutcomeKind, RankOutcome, outcome_of
from allstep.diagnosis.record import RankRecord
from allstep.diagnosis.root_cause import CAUSES, Diagnosis, diagnosis_of, judge
from allstep.errors import ChannelError
from allstep.exit_codes import PEER_LOST
from allstep.monitor.driven_clock import DrivenClock
from allstep.monitor.node_ranks import NodeRanks
from allstep.monitor.service import (
    AllArrived,
    ConnectionLost,
    MonitorEvent,
    MonitorSettings,
    Verdict,
)
from allstep.monitor.uplink import Uplink
from allstep.protocol.connection import Connection
from allstep.protocol.messages import (
    AskStacks,
    Finish,
    Heartbeat,
    Leave,
    NodeHeartbeat,
    NodeHello,
    Notice,
    RankEnding,
    RankHello,
    Refused,
    Welcome,
    decode,
)
from allstep.protocol.registration import RankRegistration
from allstep.protocol.server import Happening, MessageServer, PeerConnected, PeerGone, PeerMessage, same_attempt
from allstep.protocol.worker_exit import WorkerExit


class Relay:
    """The monitor of one node's ranks, on behalf of the hub."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        settings: MonitorSettings,
        *,
        upstream: tuple[str, int],
        node_rank: int,
        ranks: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to serve, and to connect to the head.

        Args:
            selector: the driver's.
            listener: a listening socket, the relay's from now on.
            settings: the head's.
            upstream: host and port of the head's hub.
            node_rank: of this node.
            ranks: that run here.
            clock: seconds, never turned back.
        """
        self._settings = settings
        admits = same_attempt(settings.attempt)
        self._server = MessageServer(selector, listener, self, key=settings.key, admits=admits, clock=clock)
        self._head_name = f"{upstream[0]}:{upstream[1]}"
        self._hello = NodeHello(settings.attempt, node_rank, socket.gethostname(), tuple(ranks))
        self._clock = DrivenClock(clock)
        self._uplink = Uplink(
            selector, self, upstream, self._hello, key=settings.key, link=settings.limits.link, clock=self._clock
        )
        self._ranks = NodeRanks(
            self._server, ranks, clock, lambda line, now: self._uplink.send(line, at_once=now), settings.remark
        )
        self._events: list[MonitorEvent] = []
        self._finished = False
        self._ranks_refused = False
        self._told_to_leave = False
        self._head_loss: RankOutcome | None = None
        self._foretold: dict[int, RankRecord] = {}  # ranks of the head's node that it said had ended
        self._reporter = node_rank  # which node's service writes the report of a verdict

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        self._clock.driven()
        if self._uplink.owns(key.fileobj):
            self._uplink.ready()
        else:
            self._server.ready(key)
        self._handle()

    def deadline(self) -> float:
        """When `tick` is due, on the clock."""
        times = (self._server.deadline(), self._uplink.deadline(), self._ranks.deadline())
        return min(at for at in times if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        self._clock.driven()
        self._server.tick()
        self._uplink.tick()
        self._ranks.tick()
        self._handle()

    def foretell(self, end: WorkerExit) -> None:
        """Tell the head how a rank of this node ends."""
        self._ranks.foretell(end)

    def worker_ended(self, end: WorkerExit) -> None:
        """Send the end of a worker of this node to the head."""
        self._ranks.ended(end)

    def take(self) -> list[MonitorEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order this node's ranks to leave, but for those on their way out with an exception of their own."""
        named = -1 if printer is None else printer
        self._ranks.order_out(Leave(reason, code, report or "", named, self._ranks.spared))

    def notify(self, text: str, printer: int) -> None:
        """Have a rank of this node write a line to standard error."""
        self._ranks.notify(text, printer)

    def finish(self, text: str, code: int) -> None:
        """Do nothing: no relay connects to a relay."""

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent; a driver that ends may give them a moment."""
        return self._uplink.backlog + self._ranks.backlog

    @property
    def connected(self) -> int:
        """How many ranks are connected."""
        return self._ranks.connected

    @property
    def undecided(self) -> bool:
        """Whether something is known that may still become a verdict: never, the head judges."""
        return False

    @property
    def writes_report(self) -> bool:
        """Whether the report of a verdict is this node's to write."""
        return self._reporter == self._hello.node_rank

    def present(self) -> list[int]:
        """The ranks of this node whose World is open."""
        return self._ranks.present()

    def registrations(self) -> dict[int, RankRegistration]:
        """How each rank that came introduced itself."""
        return {rank: record.registration for rank, record in self._ranks.records.items() if record.registration}

    def connection(self, rank: int) -> Connection | None:
        """The connection of a rank of this node."""
        return self._ranks.connection(rank)

    def diagnosis(self) -> Diagnosis | None:
        """The loss of the head, as this node sees it."""
        if self._head_loss is None:
            return None
        supervised = self._settings.supervised
        outcomes = [outcome_of(record, supervised=supervised) for record in self._records()]
        diagnosis = diagnosis_of(self._head_loss, outcomes, attempt=self._settings.attempt)
        return replace(diagnosis, world_size=self._settings.world_size)

    def close(self) -> None:
        """Let go of all sockets, after what waits was offered to the head once more."""
        self._uplink.flush()
        self._uplink.close()
        self._ranks.close()
        self._server.close()

    def _lose_head(self, how: str) -> None:
        self._uplink.give_up(how)
        # The head also closes when the attempt is over, or after it has refused all ranks or told them to leave. A
        # supervisor is told of the last two too: it waits for the head's last word, which will not come.
        # Without one, its service may also end with the last rank of its node while ranks that have closed their World
        # go on elsewhere.
        closed = all(record.goodbye for record in self._ranks.records.values())
        told = self._ranks_refused or self._told_to_leave or closed
        over = self._finished or (told and not self._settings.supervised)
        if over or self._head_loss is not None:
            return
        self._head_loss = self._foretold_cause() or self._link_loss(how)
        diagnosis = self.diagnosis()
        assert diagnosis is not None
        self._events.append(Verdict(diagnosis))

    def _records(self) -> list[RankRecord]:
        return [*self._foretold.values(), *self._ranks.records.values()]

    def _foretold_cause(self) -> RankOutcome | None:
        """The cause where the head said that a rank of its node had failed, and is gone since."""
        supervised = self._settings.supervised
        ends = [outcome_of(record, supervised=supervised).kind for record in self._foretold.values()]
        if not set(CAUSES).intersection(ends):
            return None
        return judge(self._records(), supervised=supervised, attempt=self._settings.attempt).cause

    def _link_loss(self, how: str) -> RankOutcome:
        if not self._uplink.head_ended:
            self._reporter = self._hello.node_rank
        what = f"the head's service at {self._head_name} {how}: it ended, or the network between is cut"
        if not self._settings.supervised:
            what += "; where it ended with rank 0, the launcher's own lines say how that did"
        lowest, order = min(self._hello.ranks, default=0), self._ranks.moment().order
        return RankOutcome(lowest, OutcomeKind.SERVICE_LOST, what, PEER_LOST, order=order, host=self._hello.host)

    def _note_foretold(self, word: RankEnding) -> None:
        moment, end = self._ranks.moment(), word.end
        if end.rank in self._ranks.records or end.rank in self._foretold:
            return
        record = self._foretold[end.rank] = RankRecord(end.rank, word.registration)
        if word.section:
            last = Heartbeat(end.rank, self._settings.attempt, 0, word.epoch, word.iteration, word.section, 0.0)
            record.note_heartbeat(last, moment.at)
        record.note_end(end, moment)

    def _from_head(self, line: bytes) -> None:
        try:
            message = decode(line)
        except ChannelError as error:
            self._lose_head(f"sent {error}")
            return
        match message:
            case Welcome():
                self._ranks.welcome(line)
                self._events.append(AllArrived())
            case Refused(reason):
                self._ranks.refuse(reason)
                # Ranks that were let in before stay in, and the head goes on listening for them.
                self._ranks_refused = not self._ranks.present()
            case NodeHeartbeat(reporter):
                self._reporter = reporter
            case RankEnding():
                self._note_foretold(message)
            case Leave():
                if message.report and message.printer < 0 and self._settings.report is not None:
                    self._settings.report(message.report)
                self._ranks.order_out(message)
                # Without a code the order only says that a failure was judged; no rank has to end of it.
                if message.code is not None:
                    self._told_to_leave = True
                    self._events.append(message)
            case Notice(text, printer):
                self._ranks.notify(text, printer)
            case AskStacks():
                self._ranks.ask_stacks(line)
            case Finish():
                self._finished = True
                self._events.append(message)

    def _act(self, happening: Happening) -> None:
        match happening:
            case PeerConnected(peer, RankHello() as hello, line):
                if self._settings.introduced is not None:
                    self._settings.introduced(hello.registration, peer.connection)
                self._ranks.arrive(peer, hello, line)
            case PeerConnected(peer):
                self._server.refuse(peer, "this is a relay, and takes no other relays")
            case PeerMessage(peer, message, line):
                self._ranks.received(peer, message, line)
            case PeerGone(peer, why):
                if (rank := self._ranks.gone(peer, why)) is not None:
                    self._events.append(ConnectionLost(rank))

    def _handle(self) -> None:
        """Act on what came from the head and from the ranks."""
        for line in self._uplink.take():
            try:
                self._from_head(line)
            except Exception as error:  # whatever it sent, this node's loop goes on
                self._lose_head(f"sent what could not be handled ({type(error).__name__})")
        self._server.handle(self._act)
        # Last, so that what the head sent before it closed has been acted on.
        if self._uplink.lost:
            self._lose_head(self._uplink.lost)
