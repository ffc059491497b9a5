"""The service of a node that is not the head: its ranks connect to it, and it speaks for them in one connection.

Contract: that of `service.Service`. What its ranks say goes to the head in the order in which they said it: heartbeats
collected for a moment, everything else at once. What the head says goes to the ranks that it concerns (`node_ranks`).
Both ends of the connection (`uplink`) beat once a second. When the head cannot be reached, closes the connection before
the attempt is over, or is not heard from for longer than `limits.link`, that is a `Verdict` here, and the driver orders
the ranks to leave. No call blocks, but for resolving the head's name when the relay is made.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from allstep.diagnosis.hang import Limits
from allstep.diagnosis.hang_detector import Watch
from allstep.diagnosis.rank_outcome import Kind, RankOutcome
from allstep.diagnosis.root_cause import Diagnosis, diagnosis_of
from allstep.errors import ChannelError
from allstep.exit_codes import PEER_LOST
from allstep.monitor.node_ranks import NodeRanks
from allstep.monitor.service import AllArrived, Finished, HubEvent, Ordered, Verdict
from allstep.monitor.uplink import Uplink
from allstep.protocol.messages import (
    CODEC,
    AskStacks,
    Finish,
    Hello,
    Leave,
    NodeHello,
    Notice,
    Refused,
    Welcome,
    decode,
)
from allstep.protocol.registration import Registration
from allstep.protocol.server import Came, Gone, MessageServer, Said, who_knows
from allstep.protocol.worker_exit import WorkerExit


class Relay:
    """The service of one node's ranks."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        upstream: tuple[str, int],
        *,
        nonce: str,
        attempt: int,
        node_rank: int,
        ranks: Sequence[int],
        world_size: int,
        limits: Limits,
        supervised: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to serve, and to connect to the head.

        Args:
            selector: the driver's.
            listener: a listening socket, the relay's from now on.
            upstream: host and port of the head's hub.
            nonce: what every rank, and this relay, has to know.
            attempt: the present start's number.
            node_rank: of this node.
            ranks: that run here.
            world_size: how many ranks the whole world has.
            limits: the head's, of which `link` counts here.
            supervised: the driver will call `worker_ended` for every rank of this node.
            clock: seconds, never turned back.

        Raises:
            OSError: the head's name does not resolve.
        """
        self._attempt = attempt
        self._supervised = supervised
        self._world_size = world_size
        self._gate = MessageServer(selector, listener, self, codec=CODEC, admits=who_knows(nonce, attempt), clock=clock)
        self._head_name = f"{upstream[0]}:{upstream[1]}"
        self._hello = NodeHello(nonce, attempt, node_rank, socket.gethostname(), tuple(ranks))
        self._watch = Watch(limits, clock)
        self._uplink = Uplink(selector, self, upstream, self._hello, link=limits.link, watch=self._watch)
        self._ranks = NodeRanks(self._gate, ranks, clock, lambda line, now: self._uplink.send(line, at_once=now))
        self._events: list[HubEvent] = []
        self._finished = False
        self._refused = False
        self._verdict: RankOutcome | None = None

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        self._watch.driven()
        if self._uplink.owns(key.fileobj):
            self._uplink.ready()
        else:
            self._gate.ready(key)
        self._hear()

    def deadline(self) -> float:
        """When `tick` is due, on the clock."""
        times = (self._gate.deadline(), self._uplink.deadline(), self._ranks.deadline())
        return min(at for at in times if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        self._watch.driven()
        self._gate.tick()
        self._uplink.tick()
        self._ranks.tick()
        self._hear()

    def worker_ended(self, end: WorkerExit) -> None:
        """Pass the end of a worker of this node to the head."""
        self._ranks.ended(end)

    def take(self) -> list[HubEvent]:
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
        """Nobody connects through a relay's relay: nothing to do."""

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent; a driver that ends may give them a moment."""
        return self._uplink.backlog + self._ranks.backlog

    @property
    def connected(self) -> int:
        """How many ranks are connected."""
        return self._ranks.connected

    @property
    def settling(self) -> bool:
        """Whether something is still to be judged here: never, the head judges."""
        return False

    def present(self) -> list[int]:
        """The ranks of this node whose World is open."""
        return self._ranks.present()

    def arrivals(self) -> dict[int, Registration]:
        """How each rank that came introduced itself."""
        return {rank: record.arrival for rank, record in self._ranks.records.items() if record.arrival}

    def case(self) -> Diagnosis | None:
        """The loss of the head, as this node sees it."""
        if self._verdict is None:
            return None
        case = diagnosis_of(self._verdict, self._ranks.accounts(supervised=self._supervised), attempt=self._attempt)
        return replace(case, world_size=self._world_size)

    def close(self) -> None:
        """Let go of all sockets, after what waits was offered to the head once more."""
        self._uplink.flush()
        self._uplink.close()
        self._gate.close()

    def _lose_head(self, how: str) -> None:
        self._uplink.give_up(how)
        over = self._finished or (self._refused and not self._supervised)  # a supervisor waits to hear that it is over
        if over or self._verdict is not None:
            return
        what = f"the head's service at {self._head_name} {how}: it ended, or the network between is cut"
        lowest, order = min(self._hello.ranks, default=0), self._ranks.moment().order
        self._verdict = RankOutcome(lowest, Kind.SERVICE_LOST, what, PEER_LOST, order=order, host=self._hello.host)
        case = self.case()
        assert case is not None
        self._events.append(Verdict(case))

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
                self._refused = not self._ranks.present()
            case Leave():
                self._ranks.order_out(message)
                if message.code is not None:
                    self._events.append(Ordered(message.reason, message.code, message.spared))
            case Notice(text, printer):
                self._ranks.notify(text, printer)
            case AskStacks():
                self._ranks.ask_stacks(line)
            case Finish(text, code):
                self._finished = True
                self._events.append(Finished(text, code))

    def _hear(self) -> None:
        """Act on what came from the head and through the gate."""
        for line in self._uplink.take():
            self._from_head(line)
        while happened := self._gate.take():
            for each in happened:
                match each:
                    case Came(peer, Hello() as hello, line):
                        self._ranks.arrive(peer, hello, line)
                    case Came(peer):
                        self._gate.refuse(peer, "this is a relay, and takes no other relays")
                    case Said(peer, message, line):
                        self._ranks.said(peer, message, line)
                    case Gone(peer, why):
                        self._ranks.gone(peer, why)
        if self._uplink.lost:
            self._lose_head(self._uplink.lost)
