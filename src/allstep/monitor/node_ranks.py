"""The ranks of a node that is not the head, at its relay: their connections, and what has to be known of each here.

The relay reports what its ranks and its driver said, and what the head wants of them. `send_line` passes lines on to
the head, at once or collected with others. A rank's record is kept so that the relay knows which ranks to welcome,
which to spare and which to answer for, and what became of each if the head is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from allstep.diagnosis.record import Moment, RankRecord
from allstep.monitor.own_stacks import read_stacks
from allstep.monitor.silent_ranks import SilentRanks
from allstep.protocol.connection import Connection
from allstep.protocol.messages import (
    Failure,
    FailureCaught,
    Goodbye,
    Heartbeat,
    Leave,
    Message,
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
from allstep.protocol.server import MessageServer, Peer
from allstep.protocol.worker_exit import WorkerExit

ANSWER_S = 1.2
"""Seconds after which the stacks file speaks for a rank that was asked for its stacks."""

_PERIOD_S = 1.0  # between two looks at the processes of silent ranks
_STDERR = 8 << 10  # characters of a worker's standard error that the head is sent


class NodeRanks:
    """The ranks of one node, as its relay knows them.

    Args:
        server: that they connect to.
        ranks: that run here.
        clock: seconds, never turned back.
        send_line: sends a line to the head; true: at once.
        remark: what this node knows of the reason, when a rank fails.
    """

    def __init__(
        self,
        server: MessageServer,
        ranks: Sequence[int],
        clock: Callable[[], float],
        send_line: Callable[[bytes, bool], None],
        remark: Callable[[], str] | None = None,
    ) -> None:
        self.records = {rank: RankRecord(rank) for rank in ranks}
        self._server = server
        self._clock = clock
        self._send_line = send_line
        self._remark = remark
        self._peers: dict[int, Peer] = {}  # each rank's present connection
        self._waiting: list[Peer] = []  # those that were not welcomed yet
        self._stacks_files: dict[int, str] = {}
        self._stacks_at: float | None = None
        self._silent = SilentRanks(self.connection, lambda heard: clock() - heard)
        self._look_at = clock() + _PERIOD_S
        self._leave_order: Leave | None = None
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
        """The ranks that need no order to leave, since an exception of their own ends them."""
        return tuple(rank for rank, record in self.records.items() if record.leaves_by_itself)

    def connection(self, rank: int) -> Connection | None:
        """The present connection of one of them."""
        peer = self._peers.get(rank)
        return None if peer is None else peer.connection

    def present(self) -> list[int]:
        """The ranks whose World is open."""
        return [rank for rank, record in self.records.items() if record.present]

    def moment(self) -> Moment:
        """The present place in the order of what came."""
        self._order += 1
        return Moment(self._order, self._clock())

    def arrive(self, peer: Peer, hello: RankHello, line: bytes) -> None:
        """A rank introduced itself."""
        rank = hello.registration.rank
        before = self.records.get(rank)
        if self._leave_order is not None:
            self._server.send(peer, encode(self._leave_order))
            return
        if before is None:
            reason = f"{hello.registration.process} says it is rank {rank}, and this node has other ranks; check RANK"
            self._server.refuse(peer, reason)
            return
        peer.rank = rank
        self._waiting.append(peer)
        known = before.registration if before.present else None
        # A second process of a rank leaves the first one's record alone; the head refuses it by name.
        if known is None or known.process == hello.registration.process:
            if known is not None:
                # The same process opens its next World. Its goodbye is still on its way in the older connection.
                self._send_up(Goodbye(rank))
            self.records[rank] = RankRecord(rank, hello.registration, heard=self._clock())
            self._peers[rank] = peer
            self._stacks_files[rank] = hello.stacks_file
        self._send_line(line + b"\n", True)

    def received(self, peer: Peer, message: Message, line: bytes) -> None:
        """A rank sent something, which goes on to the head if it is about that rank itself."""
        if (
            not isinstance(message, Heartbeat | Failure | Stacks | Goodbye | FailureCaught)
            or self._peers.get(message.rank) is not peer
        ):
            return
        record = self.records[message.rank]
        match message:
            case Heartbeat():
                record.note_heartbeat(message, self._clock())
            case Failure():
                record.note_failure(message, self.moment())
                if self._remark is not None and not message.derived and (text := self._remark()):
                    self._send_up(NodeRemark(message.rank, text))
            case FailureCaught():
                record.forget_seen()
            case Stacks():
                record.stacks = message.text or " "
            case Goodbye():
                record.note_goodbye(self.moment(), closed=message.closed)
        self._send_line(line + b"\n", not isinstance(message, Heartbeat))

    def gone(self, peer: Peer, why: str) -> int | None:
        """A rank's connection is over; return which rank's, where it had said no goodbye."""
        if peer in self._waiting:
            self._waiting.remove(peer)
        rank = peer.rank
        if rank is None or self._peers.get(rank) is not peer:
            return None
        del self._peers[rank]
        if not self.records[rank].note_lost(why, self.moment()):
            return None
        self._send_up(RankLost(rank, why))
        return rank

    def foretell(self, end: WorkerExit) -> None:
        """Tell the head how a rank of this node ends."""
        record = self.records[end.rank]
        if record.end is None and record.registration is not None and (record.left_open or not record.goodbye):
            self._send_up(RankEnding(end, replace(record.registration, facts={})))

    def ended(self, end: WorkerExit) -> None:
        """A worker of this node ended."""
        if self.records[end.rank].note_end(end, self.moment()):
            self._send_up(WorkerEnded(replace(end, stderr=end.stderr[-_STDERR:])))

    def welcome(self, line: bytes) -> None:
        """The head lets those that wait go on."""
        for peer in self._waiting:
            self._server.send(peer, line + b"\n")
        self._waiting.clear()

    def refuse(self, reason: str) -> None:
        """The head turns those that wait away."""
        waiting, self._waiting = self._waiting, []
        for peer in waiting:
            if peer.rank is not None and self._peers.get(peer.rank) is peer:
                del self._peers[peer.rank]  # the server does not report the end of a refused connection
            self._server.refuse(peer, reason)

    def order_out(self, order: Leave) -> None:
        """Pass an order to leave on to all ranks; those that it spares only learn of it."""
        self._leave_order = replace(order, report="")
        moment = self.moment()
        for rank, peer in self._peers.items():
            record = self.records[rank]
            if record.ordered is None and rank not in order.spared:
                record.ordered = moment
            code = None if rank in order.spared else order.code
            text = order.report if rank == order.printer else ""
            self._server.send(peer, encode(Leave(order.reason, code, text)))

    def notify(self, text: str, printer: int) -> None:
        """Have one of them write a line to standard error."""
        if printer in self._peers:
            self._server.send(self._peers[printer], encode(Notice(text)))

    def ask_stacks(self, line: bytes) -> None:
        """Ask all for their stacks."""
        for record in self.records.values():
            record.stacks = ""
        for peer in self._peers.values():
            self._server.send(peer, line + b"\n")
        self._look_at_processes(everyone=True)
        self._stacks_at = self._clock() + ANSWER_S

    def deadline(self) -> float:
        """When `tick` is due."""
        return self._look_at if self._stacks_at is None else min(self._look_at, self._stacks_at)

    def tick(self) -> None:
        """Look at the processes of silent ranks, and answer for those that were asked for stacks and cannot answer."""
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + _PERIOD_S
            self._look_at_processes()
        if self._stacks_at is None or self._clock() < self._stacks_at:
            return
        self._stacks_at = None
        for rank, record in self.records.items():
            if record.present and not record.stacks and (text := read_stacks(self._stacks_files.get(rank, ""))):
                self._send_up(Stacks(rank, text))

    def close(self) -> None:
        """Let go of their processes."""
        self._silent.close()

    def _look_at_processes(self, *, everyone: bool = False) -> None:
        for rank, activity in self._silent.look(self.records.values(), everyone=everyone):
            self._send_up(ProcessSeen(rank, str(activity)))

    def _send_up(self, message: Message) -> None:
        self._send_line(encode(message), True)
