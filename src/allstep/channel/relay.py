"""The service of a node that is not the head: its ranks connect to it, and it speaks for them in one connection.

Contract: driven like `Hub`, with the same methods. What its ranks say goes to the head in the order in which they said
it: heartbeats collected for a moment, everything else at once. What the head says goes to the ranks that it concerns.
Both ends of the connection beat once a second. When the head cannot be reached, closes the connection before the
attempt is over, or is not heard from for longer than `limits.link`, that is a `Verdict` here, and the driver orders the
ranks to leave. No call blocks, but for resolving the head's name when the relay is made.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from allstep.channel.arrival import Arrival
from allstep.channel.causes import Case, case_of
from allstep.channel.ending import WorkerEnd
from allstep.channel.events import AllArrived, Finished, HubEvent, Ordered, Refusal, Verdict
from allstep.channel.gate import Came, Gate, Gone, Peer, Said, who_knows
from allstep.channel.limits import Limits
from allstep.channel.messages import (
    CODEC,
    AskStacks,
    Beat,
    Bye,
    Failure,
    Finish,
    Hello,
    Leave,
    Message,
    NodeHello,
    Notice,
    RankLost,
    Refused,
    Stacks,
    Welcome,
    Withdraw,
    WorkerEnded,
    decode,
    encode,
)
from allstep.channel.record import Account, Kind, Moment, Record, account
from allstep.channel.stacks_file import read_stacks
from allstep.channel.uplink import Uplink
from allstep.channel.watch import Watch
from allstep.errors import ChannelError
from allstep.exit_codes import PEER_LOST

ANSWER_S = 1.2
"""Seconds after which the stacks file speaks for a rank that was asked for its stacks."""

_STDERR = 8 << 10


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
        self._selector = selector
        self._clock = clock
        self._attempt = attempt
        self._limits = limits
        self._supervised = supervised
        self._gate = Gate(selector, listener, self, codec=CODEC, admits=who_knows(nonce, attempt), clock=clock)
        self._head_name = f"{upstream[0]}:{upstream[1]}"
        self._hello = NodeHello(nonce, attempt, node_rank, socket.gethostname(), tuple(ranks))
        self._world_size = world_size
        self._records = {rank: Record(rank) for rank in ranks}
        self._peers: dict[int, Peer] = {}  # each rank's present connection
        self._waiting: list[Peer] = []  # those that were not welcomed yet
        self._stacks_files: dict[int, str] = {}
        self._watch = Watch(limits, clock)
        self._uplink = Uplink(selector, self, upstream, self._hello, link=limits.link, watch=self._watch)
        self._events: list[HubEvent] = []
        self._order = 0
        self._stacks_at: float | None = None
        self._finished = False
        self._refused = False
        self._told: Leave | None = None
        self._verdict: Account | None = None

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
        times = (self._gate.deadline(), self._uplink.deadline(), self._stacks_at)
        return min(at for at in times if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        self._watch.driven()
        self._gate.tick()
        self._uplink.tick()
        if self._stacks_at is not None and self._clock() >= self._stacks_at:
            self._answer_for_the_silent()
        self._hear()

    def worker_ended(self, end: WorkerEnd) -> None:
        """Pass the end of a worker of this node to the head."""
        record = self._records[end.rank]
        if record.end is None:
            record.end, record.ended = end, self._moment()
            self._tell(WorkerEnded(replace(end, stderr=end.stderr[-_STDERR:])))

    def take(self) -> list[HubEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order this node's ranks to leave, but for those on their way out with an exception of their own."""
        spared = tuple(rank for rank, record in self._records.items() if record.failure and not record.failure.derived)
        self._order_out(Leave(reason, code, report or "", -1 if printer is None else printer, spared))

    def notify(self, text: str, printer: int) -> None:
        """Have a rank of this node write a line to standard error."""
        if printer in self._peers:
            self._gate.send(self._peers[printer], encode(Notice(text)))

    def finish(self, text: str, code: int) -> None:
        """Nobody connects through a relay's relay: nothing to do."""

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent; a driver that ends may give them a moment."""
        return self._uplink.backlog + sum(peer.connection.backlog for peer in self._peers.values())

    @property
    def connected(self) -> int:
        """How many ranks are connected."""
        return len({*self._peers.values(), *self._waiting})

    @property
    def settling(self) -> bool:
        """Whether something is still to be judged here: never, the head judges."""
        return False

    def present(self) -> list[int]:
        """The ranks of this node whose World is open."""
        return [rank for rank, record in self._records.items() if record.present]

    def arrivals(self) -> dict[int, Arrival]:
        """How each rank that came introduced itself."""
        return {rank: record.arrival for rank, record in self._records.items() if record.arrival}

    def case(self) -> Case | None:
        """The loss of the head, as this node sees it."""
        if self._verdict is None:
            return None
        accounts = [account(record, supervised=self._supervised) for record in self._records.values()]
        case = case_of(self._verdict, accounts, attempt=self._attempt)
        return replace(case, world_size=self._world_size)

    def close(self) -> None:
        """Let go of all sockets, after what waits was offered to the head once more."""
        self._uplink.flush()
        self._uplink.close()
        self._gate.close()

    def _moment(self) -> Moment:
        self._order += 1
        return Moment(self._order, self._clock())

    def _lose_head(self, how: str) -> None:
        self._uplink.give_up(how)
        if self._finished or self._refused or self._verdict is not None:
            return
        what = f"the head's service at {self._head_name} {how}: it ended, or the network between is cut"
        lowest = min(self._records, default=0)
        node = self._hello
        self._verdict = Account(lowest, Kind.SERVICE_LOST, what, PEER_LOST, order=self._moment().order, host=node.host)
        case = self.case()
        assert case is not None
        self._events.append(Verdict(case))

    def _tell(self, message: Message) -> None:
        self._uplink.send(encode(message), at_once=True)

    def _from_head(self, line: bytes) -> None:
        try:
            message = decode(line)
        except ChannelError as error:
            self._lose_head(f"sent {error}")
            return
        match message:
            case Welcome():
                for peer in self._waiting:
                    self._gate.send(peer, line + b"\n")
                self._waiting.clear()
                self._events.append(AllArrived())
            case Refused(reason):
                waiting, self._waiting = self._waiting, []
                for peer in waiting:
                    if peer.name is not None and self._peers.get(peer.name) is peer:
                        del self._peers[peer.name]  # the gate will not say any more that it is gone
                    self._gate.refuse(peer, reason)
                self._refused = not self.present()
                self._events.append(Refusal(reason))
            case Leave():
                self._order_out(message)
                if message.code is not None:
                    self._events.append(Ordered(message.reason, message.code, message.spared))
            case Notice(text, printer):
                self.notify(text, printer)
            case AskStacks():
                for record in self._records.values():
                    record.stacks = ""
                for peer in self._peers.values():
                    self._gate.send(peer, line + b"\n")
                self._stacks_at = self._clock() + ANSWER_S
            case Finish(text, code):
                self._finished = True
                self._events.append(Finished(text, code))

    def _order_out(self, order: Leave) -> None:
        self._told = replace(order, report="")
        moment = self._moment()
        for rank, peer in self._peers.items():
            record = self._records.get(rank)
            if record is not None and record.ordered is None and rank not in order.spared:
                record.ordered = moment
            code = None if rank in order.spared else order.code
            text = order.report if rank == order.printer else ""
            self._gate.send(peer, encode(Leave(order.reason, code, text)))

    def _answer_for_the_silent(self) -> None:
        self._stacks_at = None
        for rank, record in self._records.items():
            if record.present and not record.stacks and (text := read_stacks(self._stacks_files.get(rank, ""))):
                self._tell(Stacks(rank, text))

    def _hear(self) -> None:
        """Act on what came from the head and through the gate."""
        for line in self._uplink.take():
            self._from_head(line)
        while happened := self._gate.take():
            for each in happened:
                match each:
                    case Came(peer, Hello() as hello, line):
                        self._arrive(peer, hello, line)
                    case Came(peer, _, _):
                        self._gate.refuse(peer, "this is a relay, and takes no other relays")
                    case Said(peer, message, line):
                        self._say(peer, message, line)
                    case Gone(peer, why):
                        self._lose(peer, why)
        if self._uplink.lost:
            self._lose_head(self._uplink.lost)

    def _arrive(self, peer: Peer, hello: Hello, line: bytes) -> None:
        rank = hello.arrival.rank
        before = self._records.get(rank)
        if self._told is not None:
            self._gate.send(peer, encode(self._told))
            return
        if before is None:
            reason = f"{hello.arrival.process} says it is rank {rank}, and this node has other ranks; check RANK"
            self._gate.refuse(peer, reason)
            return
        peer.name = rank
        self._waiting.append(peer)
        if not (before.present and before.arrival and before.arrival.process != hello.arrival.process):
            if before.present:
                self._tell(Bye(rank))  # the same process: its own goodbye is on its way in the older connection
            self._records[rank] = Record(rank, hello.arrival)
            self._peers[rank] = peer
            self._stacks_files[rank] = hello.stacks_file
        self._uplink.send(line + b"\n", at_once=True)

    def _say(self, peer: Peer, message: Message, line: bytes) -> None:
        if (
            not isinstance(message, Beat | Failure | Stacks | Bye | Withdraw)
            or self._peers.get(message.rank) is not peer
        ):
            return
        record = self._records[message.rank]
        match message:
            case Beat():
                record.beat, record.beaten = message, self._clock()
            case Failure():
                record.note_failure(message, self._moment())
            case Withdraw():
                record.forget_seen()
            case Stacks():
                record.stacks = message.text or " "
            case Bye():
                record.bye, record.left_open = self._moment(), not message.closed
        self._uplink.send(line + b"\n", at_once=not isinstance(message, Beat))

    def _lose(self, peer: Peer, why: str) -> None:
        if peer in self._waiting:
            self._waiting.remove(peer)
        rank = peer.name
        if rank is None or self._peers.get(rank) is not peer:
            return
        del self._peers[rank]
        record = self._records[rank]
        if record.bye is None:
            record.lost, record.lost_why = self._moment(), why
            self._tell(RankLost(rank, why))
