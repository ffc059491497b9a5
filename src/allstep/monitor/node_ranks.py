"""The ranks of a node that is not the head, at its relay: their connections, and what has to be known of each here.

Contract: the relay says what its ranks and its driver said and what the head wants of them; `tell` passes lines on to
the head, at once or with others in a moment. A rank's record is kept so that the relay knows whom to welcome, to spare
and to answer for, and what became of each should the head be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from allstep.diagnosis.rank_outcome import RankOutcome, account
from allstep.diagnosis.record import Moment, RankRecord
from allstep.monitor.own_stacks import read_stacks
from allstep.protocol.messages import (
    Beat,
    Bye,
    Failure,
    Hello,
    Leave,
    Message,
    Notice,
    RankLost,
    Stacks,
    Withdraw,
    WorkerEnded,
    encode,
)
from allstep.protocol.server import MessageServer, Peer
from allstep.protocol.worker_exit import WorkerExit

ANSWER_S = 1.2
"""Seconds after which the stacks file speaks for a rank that was asked for its stacks."""

_STDERR = 8 << 10


class NodeRanks:
    """One node's ranks.

    Args:
        gate: through which they come.
        ranks: that run here.
        clock: seconds, never turned back.
        tell: sends a line to the head; true: at once.
    """

    def __init__(
        self, gate: MessageServer, ranks: Sequence[int], clock: Callable[[], float], tell: Callable[[bytes, bool], None]
    ) -> None:
        self.records = {rank: RankRecord(rank) for rank in ranks}
        self._gate = gate
        self._clock = clock
        self._tell = tell
        self._peers: dict[int, Peer] = {}  # each rank's present connection
        self._waiting: list[Peer] = []  # those that were not welcomed yet
        self._stacks_files: dict[int, str] = {}
        self._stacks_at: float | None = None
        self._told: Leave | None = None
        self._order = 0

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent to them."""
        return sum(peer.connection.backlog for peer in self._peers.values())

    @property
    def connected(self) -> int:
        """How many are connected."""
        return len({*self._peers.values(), *self._waiting})

    @property
    def spared(self) -> tuple[int, ...]:
        """Those that are on their way out with an exception of their own."""
        return tuple(rank for rank, record in self.records.items() if record.leaves_by_itself)

    def present(self) -> list[int]:
        """The ranks whose World is open."""
        return [rank for rank, record in self.records.items() if record.present]

    def accounts(self, *, supervised: bool) -> list[RankOutcome]:
        """What became of each."""
        return [account(record, supervised=supervised) for record in self.records.values()]

    def moment(self) -> Moment:
        """The present place in the order of what came."""
        self._order += 1
        return Moment(self._order, self._clock())

    def arrive(self, peer: Peer, hello: Hello, line: bytes) -> None:
        """A rank introduced itself."""
        rank = hello.arrival.rank
        before = self.records.get(rank)
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
            if before.present:  # the same process: its own goodbye is on its way in the older connection
                self._say_to_head(Bye(rank))
            self.records[rank] = RankRecord(rank, hello.arrival)
            self._peers[rank] = peer
            self._stacks_files[rank] = hello.stacks_file
        self._tell(line + b"\n", True)

    def said(self, peer: Peer, message: Message, line: bytes) -> None:
        """A rank said something, which goes to the head if it is for itself."""
        if (
            not isinstance(message, Beat | Failure | Stacks | Bye | Withdraw)
            or self._peers.get(message.rank) is not peer
        ):
            return
        record = self.records[message.rank]
        match message:
            case Beat():
                record.note_beat(message, self._clock())
            case Failure():
                record.note_failure(message, self.moment())
            case Withdraw():
                record.forget_seen()
            case Stacks():
                record.stacks = message.text or " "
            case Bye():
                record.note_bye(self.moment(), closed=message.closed)
        self._tell(line + b"\n", not isinstance(message, Beat))

    def gone(self, peer: Peer, why: str) -> None:
        """A rank's connection is over."""
        if peer in self._waiting:
            self._waiting.remove(peer)
        rank = peer.name
        if rank is None or self._peers.get(rank) is not peer:
            return
        del self._peers[rank]
        if self.records[rank].note_lost(why, self.moment()):
            self._say_to_head(RankLost(rank, why))

    def ended(self, end: WorkerExit) -> None:
        """A worker of this node ended."""
        if self.records[end.rank].note_end(end, self.moment()):
            self._say_to_head(WorkerEnded(replace(end, stderr=end.stderr[-_STDERR:])))

    def welcome(self, line: bytes) -> None:
        """The head lets those that wait go on."""
        for peer in self._waiting:
            self._gate.send(peer, line + b"\n")
        self._waiting.clear()

    def refuse(self, reason: str) -> None:
        """The head turns those that wait away."""
        waiting, self._waiting = self._waiting, []
        for peer in waiting:
            if peer.name is not None and self._peers.get(peer.name) is peer:
                del self._peers[peer.name]  # the gate will not say any more that it is gone
            self._gate.refuse(peer, reason)

    def order_out(self, order: Leave) -> None:
        """Order all to leave, but those that it spares."""
        self._told = replace(order, report="")
        moment = self.moment()
        for rank, peer in self._peers.items():
            record = self.records[rank]
            if record.ordered is None and rank not in order.spared:
                record.ordered = moment
            code = None if rank in order.spared else order.code
            text = order.report if rank == order.printer else ""
            self._gate.send(peer, encode(Leave(order.reason, code, text)))

    def notify(self, text: str, printer: int) -> None:
        """Have one of them write a line to standard error."""
        if printer in self._peers:
            self._gate.send(self._peers[printer], encode(Notice(text)))

    def ask_stacks(self, line: bytes) -> None:
        """Ask all for their stacks."""
        for record in self.records.values():
            record.stacks = ""
        for peer in self._peers.values():
            self._gate.send(peer, line + b"\n")
        self._stacks_at = self._clock() + ANSWER_S

    def deadline(self) -> float | None:
        """When `tick` is due."""
        return self._stacks_at

    def tick(self) -> None:
        """Answer for those that were asked for their stacks and cannot."""
        if self._stacks_at is None or self._clock() < self._stacks_at:
            return
        self._stacks_at = None
        for rank, record in self.records.items():
            if record.present and not record.stacks and (text := read_stacks(self._stacks_files.get(rank, ""))):
                self._say_to_head(Stacks(rank, text))

    def _say_to_head(self, message: Message) -> None:
        self._tell(encode(message), True)
