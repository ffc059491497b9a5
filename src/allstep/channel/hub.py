"""The service that a world's ranks report to, as an object that any loop drives.

Contract: the hub registers its sockets with the selector that it is given; `key.data` is then a `HubKey`. The loop
calls `ready(key)` for those, `tick()` at the latest when `deadline()` (on `clock`) has passed, `worker_ended` for each
worker whose end the driver learns of, and then `take()`, which gives what happened. No call blocks.

What it does: it turns away who does not belong here; lets the ranks go on when all have arrived and fit; notes what
they report; and comes to at most one `Verdict`, when a failure is settled or a hang was found and stacks were gathered
(for at most `GATHER_S`). Orders to leave are the driver's to give. A world that was closed in order may be opened again
by the same processes.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from allstep.channel.arrival import objection
from allstep.channel.causes import CAUSES, Case, case_of, due, judge
from allstep.channel.ending import WorkerEnd
from allstep.channel.events import (
    AllArrived,
    AllEnded,
    Finished,
    HubEvent,
    Ordered,
    Refusal,
    StragglerSeen,
    Verdict,
)
from allstep.channel.gate import Came, Gate, Gone, HubKey, Peer, Said
from allstep.channel.limits import Limits
from allstep.channel.messages import (
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
    Refused,
    Stacks,
    Welcome,
    Withdraw,
    WorkerEnded,
    encode,
)
from allstep.channel.record import Moment, Record, account
from allstep.channel.roll_call import RollCall
from allstep.channel.stacks_file import read_stacks
from allstep.channel.watch import Watch

__all__ = [
    "AllArrived",
    "AllEnded",
    "Finished",
    "Hub",
    "HubEvent",
    "HubKey",
    "Ordered",
    "Refusal",
    "StragglerSeen",
    "Verdict",
]

GATHER_S = 2.0
"""Seconds that ranks have to answer with their stacks."""

_PERIOD = 1.0
_SOON = 0.02  # evidence is looked at this much later, so that a thousand ends are not judged a thousand times


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
        self._attempt = attempt
        self._world_size = world_size
        self._limits = limits
        self._supervised = supervised
        self._clock = clock
        self._gate = Gate(selector, listener, self, nonce=nonce, attempt=attempt, clock=clock)
        self._records = {rank: Record(rank) for rank in range(world_size)}
        self._doors: dict[int, Peer] = {}  # the way to each rank that was welcomed: its own connection, or a relay's
        self._nodes: dict[Peer, _Node] = {}
        self._roll: RollCall[Peer] = RollCall(world_size, clock)
        self._watch = Watch(limits, clock)
        self._stacks_files: dict[int, str] = {}
        self._events: list[HubEvent] = []
        self._order = 0
        self._furthest = (0, 0)
        self._refusal = ""
        self._look_at: float | None = None
        self._gather_until: float | None = None
        self._unanswered: set[int] = set()
        self._tick_at = clock() + _PERIOD
        self._verdict: Case | None = None
        self._told: Leave | None = None
        self._all_ended = False
        self._finished = False

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        self._watch.driven()
        self._gate.ready(key)
        self._hear()

    def deadline(self) -> float | None:
        """When `tick` is due, on the clock."""
        times = (self._gate.deadline(), self._roll.deadline(), self._look_at, self._gather_until, self._tick_at)
        return min(at for at in times if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        self._watch.driven()
        now = self._clock()
        self._gate.tick()
        if now >= self._tick_at:
            self._tick_at = now + _PERIOD
            self._keep_links(now)
            self._miss_the_ended()
            self._watch_progress()
        if self._gather_until is not None and now >= self._gather_until:
            self._gathered()
        if self._look_at is not None and now >= self._look_at:
            self._look(now)
        self._hear()

    def worker_ended(self, end: WorkerEnd) -> None:
        """Take note of how a worker ended."""
        record = self._records[end.rank]
        if record.end is None:
            record.end, record.ended = end, self._moment()
            self._miss_the_ended()
            self._evidence()
            if all(each.end is not None for each in self._records.values()):
                self._conclude()

    def take(self) -> list[HubEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order all ranks to leave, but for those that are on their way out with an exception of their own.

        Args:
            reason: for the process that leaves.
            code: its exit status.
            printer: the rank that writes the report; None: nobody does.
            report: the text.
        """
        spared = [rank for rank, record in self._records.items() if record.failure and not record.failure.derived]
        now = self._moment()
        for rank, record in self._records.items():
            if record.end is None and record.ordered is None and rank not in spared:
                record.ordered = now
        self._told = Leave(reason, code, spared=tuple(spared))
        doors = {door for door in self._doors.values() if door not in self._nodes}
        doors |= {door for _, door in self._roll.waiting if door not in self._nodes}
        for door in doors:
            text = report if report and door.name == printer else ""
            self._gate.send(door, encode(Leave(reason, None if door.name in spared else code, text)))
        for door, node in self._nodes.items():
            text = report if report and printer in node.ranks else ""
            told = replace(self._told, report=text, printer=-1 if printer is None else printer)
            self._gate.send(door, encode(told))
        self._hear()

    def notify(self, text: str, printer: int) -> None:
        """Have a rank write a line to standard error."""
        door = self._doors.get(printer)
        if door is not None:
            self._gate.send(door, encode(Notice(text, printer)))

    def finish(self, text: str, code: int) -> None:
        """Tell every relay that the attempt is over."""
        self._finished = True
        for door in list(self._nodes):
            self._gate.send(door, encode(Finish(text, code)))

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent; a driver that ends may give them a moment."""
        return sum(door.connection.backlog for door in {*self._doors.values(), *self._nodes})

    @property
    def connected(self) -> int:
        """How many ranks and relays are connected."""
        return len({*self._doors.values(), *self._nodes, *(door for _, door in self._roll.waiting)})

    def progress(self) -> tuple[int, int]:
        """The furthest (epoch, iteration) that any rank reached."""
        return self._furthest

    def status(self, rank: int) -> Beat | None:
        """The last heartbeat of a rank."""
        return self._records[rank].beat

    def ends(self) -> Mapping[int, WorkerEnd]:
        """How workers ended, by rank."""
        return {rank: record.end for rank, record in self._records.items() if record.end is not None}

    def present(self) -> list[int]:
        """The ranks whose World is open, as far as is known."""
        return [rank for rank, record in self._records.items() if record.present]

    def processes(self) -> dict[int, tuple[str, int]]:
        """Host and process of each rank that came."""
        return {r.rank: (r.arrival.host, r.arrival.pid) for r in self._records.values() if r.arrival}

    @property
    def settling(self) -> bool:
        """Whether something is known that may still become a verdict."""
        return self._verdict is None and (self._look_at is not None or self._gather_until is not None)

    def case(self) -> Case | None:
        """The case as it stands now: the cause of the verdict, and what has become of the others since."""
        if self._verdict is None:
            return None
        accounts = [account(record, supervised=self._supervised) for record in self._records.values()]
        cause = self._verdict.cause
        now = next((each for each in accounts if each.rank == cause.rank), cause)
        cause = now if now.kind == cause.kind else replace(cause, output=now.output, note=now.note)
        return case_of(
            cause, accounts, attempt=self._attempt, explanation=self._verdict.explanation, slow=self._verdict.slow
        )

    def close(self) -> None:
        """Let go of all sockets."""
        self._gate.close()

    def _moment(self) -> Moment:
        self._order += 1
        return Moment(self._order, self._clock())

    def _evidence(self) -> None:
        if self._look_at is None and self._verdict is None:
            self._look_at = self._clock() + _SOON

    def _hear(self) -> None:
        """Act on what came through the gate, and on what that leads to."""
        while happened := self._gate.take():
            for each in happened:
                match each:
                    case Came(peer, Hello() as hello):
                        peer.name = hello.arrival.rank
                        self._arrive(hello, peer)
                    case Came(peer, NodeHello() as hello):
                        self._nodes[peer] = _Node(hello, self._clock())
                    case Said(peer, message, _):
                        self._say(peer, message)
                    case Gone(peer, why):
                        self._lose(peer, why)
        verdict = self._roll.verdict()
        if verdict is not None:
            self._admit() if not verdict else self._refuse(verdict)

    def _say(self, peer: Peer, message: Message) -> None:
        node = self._nodes.get(peer)
        if node is not None:
            node.heard = self._clock()
            match message:
                case Hello():
                    self._arrive(message, peer)
                case WorkerEnded(end) if end.rank in node.ranks and end.rank in self._records:
                    self.worker_ended(end)
                case RankLost(rank, why) if rank in node.ranks:
                    self._rank_lost(rank, why, peer)
                case Beat() | Failure() | Stacks() | Bye() | Withdraw() if message.rank in node.ranks:
                    self._note(message, peer)
        elif isinstance(message, Beat | Failure | Stacks | Bye | Withdraw) and message.rank == peer.name:
            self._note(message, peer)

    def _note(self, message: Beat | Failure | Stacks | Bye | Withdraw, peer: Peer) -> None:
        record = self._records.get(message.rank)
        if record is None or self._doors.get(message.rank) is not peer:
            return
        match message:
            case Beat():
                record.beat, record.beaten = message, self._clock()
                self._furthest = max(self._furthest, (message.epoch, message.iteration))
            case Failure():
                record.note_failure(message, self._moment())
                self._furthest = max(self._furthest, (message.epoch, message.iteration))
                self._evidence()
            case Withdraw():
                record.forget_seen()
            case Stacks():
                record.stacks, record.trace = message.text, message.trace
                self._unanswered.discard(message.rank)
                if self._gather_until is not None and not self._unanswered:
                    self._gather_until = self._clock()
            case Bye():
                record.bye, record.left_open = self._moment(), not message.closed
                if message.closed:
                    record.forget_seen()
                self._evidence()

    def _arrive(self, hello: Hello, peer: Peer) -> None:
        arrival = hello.arrival
        record = self._records.get(arrival.rank)
        if self._told is not None:
            self._gate.send(peer, encode(self._told))
        elif self._refusal:
            self._turn_away(peer, self._refusal)
        elif record is not None and record.present and record.arrival and record.arrival.process != arrival.process:
            self._turn_away(peer, objection([record.arrival, arrival], self._world_size))
        else:
            if record is not None and record.present:
                record.bye = self._moment()  # the same process: its goodbye is on its way in the older connection
            if record is not None:
                self._stacks_files[arrival.rank] = hello.stacks_file
            self._roll.add(arrival, peer, hello.patience)

    def _turn_away(self, peer: Peer, reason: str) -> None:
        if peer in self._nodes:
            self._gate.send(peer, encode(Refused(reason)))
        else:
            self._gate.refuse(peer, reason)

    def _admit(self) -> None:
        waited = self._roll.clear()
        for arrival, door in waited:
            self._records[arrival.rank] = Record(arrival.rank, arrival, beaten=self._clock())
            self._doors[arrival.rank] = door
        welcome = encode(Welcome())
        for door in dict.fromkeys(door for _, door in waited):
            self._gate.send(door, welcome)
        self._events.append(AllArrived())

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        for door in dict.fromkeys(door for _, door in self._roll.clear()):
            self._turn_away(door, reason)
        self._events.append(Refusal(reason))

    def _lose(self, peer: Peer, why: str) -> None:
        if peer in self._nodes:
            self._lose_node(peer, why)
        elif peer.name is not None:
            self._rank_lost(peer.name, why, peer)

    def _rank_lost(self, rank: int, why: str, peer: Peer) -> None:
        record = self._records.get(rank)
        if record is None:
            return
        for arrival in self._roll.remove_rank(rank) if peer in self._nodes else self._roll.remove(peer):
            record.arrival, record.lost, record.lost_why = arrival, self._moment(), why
            self._evidence()
        if self._doors.get(rank) is peer:
            del self._doors[rank]
            if record.bye is None and record.lost is None:
                record.lost, record.lost_why = self._moment(), why
                self._evidence()

    def _lose_node(self, peer: Peer, why: str) -> None:
        node = self._nodes.pop(peer)
        moment = self._moment()
        if not self._finished:
            for arrival in self._roll.remove(peer):
                if arrival.rank in self._records:
                    self._records[arrival.rank].arrival = arrival
            for rank in node.ranks:
                record = self._records.get(rank)
                if record is None or record.end or record.bye:
                    continue
                record.lost, record.node_lost = record.lost or moment, True
                record.lost_why = f"was lost with node {node.rank} ({node.host}): {why}"
            self._evidence()
        for rank in [rank for rank, door in self._doors.items() if door is peer]:
            del self._doors[rank]

    def _keep_links(self, now: float) -> None:
        for peer, node in list(self._nodes.items()):
            self._gate.send(peer, encode(NodeBeat()))
            if self._watch.age(node.heard) > self._limits.link and not self._finished:
                self._lose_node(peer, f"nothing was heard from it for {now - node.heard:.0f} s")

    def _miss_the_ended(self) -> None:
        """Note where ranks wait in init for one that will not come."""
        for rank in self._roll.missing:
            record = self._records[rank]
            if record.end is not None and not record.awaited:
                record.awaited = "and did not call init, where others wait for it"
                self._evidence()

    def _watch_progress(self) -> None:
        if self._verdict is not None:
            return
        records = self._records.values()
        for rank, ratio in self._watch.new_stragglers(records):
            self._events.append(StragglerSeen(rank, ratio))
        settling = due(list(records), supervised=self._supervised) is not None
        if self._gather_until is None and not settling and self._watch.hangs(records, self._away()):
            self._ask_stacks()

    def _away(self) -> set[int]:
        """The ranks of nodes that are not heard from."""
        unheard = [node for node in self._nodes.values() if self._watch.age(node.heard) > 3 * _PERIOD]
        return {rank for node in unheard for rank in node.ranks}

    def _ask_stacks(self) -> None:
        self._gather_until = self._clock() + GATHER_S
        self._unanswered = set(self.present())
        for record in self._records.values():
            record.stacks = record.trace = ""
        line = encode(AskStacks())
        for door in dict.fromkeys(self._doors.values()):
            self._gate.send(door, line)

    def _gathered(self) -> None:
        """The stacks are in, or will not come: say who is behind, and judge."""
        self._gather_until = None
        for rank, record in self._records.items():
            if record.present and not record.stacks:
                record.stacks = read_stacks(self._stacks_files.get(rank, ""))
        failed = any(record.failed or record.ended for record in self._records.values())
        if not failed and not self._watch.hangs(self._records.values(), self._away()):
            return  # it moves again
        hang = (self._watch.suspects if failed else self._watch.diagnose)(self._records.values())
        moment = self._moment()
        for rank, why in hang.behind.items():
            self._records[rank].hung, self._records[rank].hung_why = moment, why
        if hang.behind or failed:
            self._judge(hang.explanation)

    def _look(self, now: float) -> None:
        """Judge if there is enough to judge by."""
        self._look_at = None
        if self._verdict is not None or self._gather_until is not None:
            return
        records = list(self._records.values())
        at = due(records, supervised=self._supervised)
        if at is None:
            return
        if now < at:
            self._look_at = at
            return
        kinds = {account(record, supervised=self._supervised).kind for record in records}
        if kinds.isdisjoint(CAUSES) and any(record.present and not record.failed for record in records):
            self._ask_stacks()  # others gave up on somebody who has not said a word: see what those do
            return
        self._judge("")

    def _conclude(self) -> None:
        """Every worker has ended."""
        if self._verdict is None and due(list(self._records.values()), supervised=self._supervised) is not None:
            self._judge("")
        if not self._all_ended:
            self._all_ended = True
            self._events.append(AllEnded())

    def _judge(self, explanation: str) -> None:
        self._verdict = judge(
            list(self._records.values()),
            supervised=self._supervised,
            attempt=self._attempt,
            explanation=explanation,
            slow=self._watch.slow,
        )
        self._look_at = None
        self._events.append(Verdict(self._verdict))


class _Node:
    """A relay that is connected."""

    def __init__(self, hello: NodeHello, now: float) -> None:
        self.rank = hello.node_rank
        self.host = hello.host
        self.ranks = frozenset(hello.ranks)
        self.heard = now
