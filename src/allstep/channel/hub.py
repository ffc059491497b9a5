"""The service that a world's ranks report to, as an object that any loop drives.

Contract: the hub registers its sockets with the selector that it is given; `key.data` is then a `HubKey`. The loop
calls `ready(key)` for those, `tick()` at the latest when `deadline()` (on `clock`) has passed, `worker_ended` for each
worker whose end the driver learns of, and then `take()`, which gives what happened. No call blocks.

What it does: it turns away who does not belong here, lets the ranks go on when all have arrived and fit, and passes
what they report to its `Inquiry`, which comes to at most one `Verdict`. Orders to leave are the driver's to give. A
world that was closed in order may be opened again by the same processes.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from allstep.channel.arrival import Arrival, objection
from allstep.channel.causes import Case
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
from allstep.channel.gate import Came, Gate, Gone, HubKey, Peer, Said, who_knows
from allstep.channel.inquiry import Inquiry
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
from allstep.channel.roll_call import RollCall

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
        self._world_size = world_size
        self._limits = limits
        self._clock = clock
        self._events: list[HubEvent] = []
        self._gate = Gate(selector, listener, self, codec=CODEC, admits=who_knows(nonce, attempt), clock=clock)
        self._inquiry = Inquiry(
            world_size,
            attempt=attempt,
            supervised=supervised,
            limits=limits,
            clock=clock,
            events=self._events,
            ask_stacks=self._ask_stacks,
        )
        self._doors: dict[int, Peer] = {}  # the way to each rank that was let in: its own connection, or a relay's
        self._nodes: dict[Peer, _Node] = {}
        self._expected: dict[int, tuple[Collection[int], float]] = {}
        self._roll: RollCall[Peer] = RollCall(world_size, clock)
        self._hellos: dict[int, Hello] = {}
        self._refusal = ""
        self._told: Leave | None = None
        self._tick_at = clock() + _PERIOD
        self._finished = False

    def expect_node(self, node_rank: int, ranks: Collection[int]) -> None:
        """A node with these ranks will connect; if it does not within twice the limit for links, it is lost."""
        self._expected[node_rank] = ranks, self._clock() + 2 * self._limits.link

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        self._inquiry.watch.driven()
        self._gate.ready(key)
        self._hear()

    def deadline(self) -> float:
        """When `tick` is due, on the clock."""
        times = (self._gate.deadline(), self._roll.deadline(), self._inquiry.deadline(), self._tick_at)
        return min(at for at in times if at is not None)

    def tick(self) -> None:
        """Act on the time that has passed."""
        self._inquiry.watch.driven()
        now = self._clock()
        self._gate.tick()
        if now >= self._tick_at:
            self._tick_at = now + _PERIOD
            self._keep_links()
            self._inquiry.awaited(self._roll.missing)
            unheard = [node for node in self._nodes.values() if self._silence(node) > 3 * _PERIOD]
            self._inquiry.watch_progress({rank for node in unheard for rank in node.ranks})
        self._inquiry.tick()
        self._hear()

    def worker_ended(self, end: WorkerEnd) -> None:
        """Take note of how a worker ended."""
        self._inquiry.ended(end)
        self._inquiry.awaited(self._roll.missing)

    def take(self) -> list[HubEvent]:
        """What happened since the last call, in order."""
        events = self._events.copy()
        self._events.clear()
        return events

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order all ranks to leave, but for those that are on their way out with an exception of their own.

        Args:
            reason: for the process that leaves.
            code: its exit status.
            printer: the rank that writes the report; None: nobody does.
            report: the text.
        """
        spared = self._inquiry.order_leave()
        self._told = Leave(reason, code, printer=-1 if printer is None else printer, spared=spared)
        doors = {*self._doors.values(), *(door for _, door in self._roll.waiting)}
        for door in doors - self._nodes.keys():
            text = report if report and door.name == printer else ""
            self._gate.send(door, encode(Leave(reason, None if door.name in spared else code, text)))
        for door, node in list(self._nodes.items()):
            text = report if report and printer in node.ranks else ""
            self._gate.send(door, encode(replace(self._told, report=text)))
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

    def ends(self) -> Mapping[int, WorkerEnd]:
        """How workers ended, by rank."""
        return self._inquiry.ends()

    def present(self) -> list[int]:
        """The ranks whose World is open, as far as is known."""
        return self._inquiry.present()

    def arrivals(self) -> dict[int, Arrival]:
        """How each rank that came introduced itself."""
        return {rank: record.arrival for rank, record in self._inquiry.records.items() if record.arrival}

    def case(self) -> Case | None:
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
                        self._nodes[peer] = _Node(hello, self._world_size, self._clock())
                        self._expected.pop(hello.node_rank, None)
                    case Said(peer, message, _) if peer in self._nodes:
                        self._say_node(peer, self._nodes[peer], message)
                    case Said(peer, message, _):
                        self._say(peer, peer.name, message)
                    case Gone(peer, why) if peer in self._nodes:
                        self._lose_node(peer, why)
                    case Gone(peer, why):
                        self._lose(peer, why)
        verdict = self._roll.verdict()
        if verdict is not None:
            self._admit() if not verdict else self._refuse(verdict)

    def _say_node(self, peer: Peer, node: _Node, message: Message) -> None:
        node.heard = self._clock()
        match message:
            case Hello():
                self._arrive(message, peer)
            case WorkerEnded(end) if end.rank in node.ranks:
                self.worker_ended(end)
            case RankLost(rank, why) if rank in node.ranks:
                for arrival in self._roll.remove_rank(rank):
                    self._inquiry.lost(rank, why, arrival)
                self._shut(rank, peer, why)
            case Beat() | Failure() | Stacks() | Bye() | Withdraw() if message.rank in node.ranks:
                self._say(peer, message.rank, message)

    def _say(self, peer: Peer, rank: int | None, message: Message) -> None:
        """Something from a rank, which may speak only for itself, and only once it was let in."""
        if rank is None or self._doors.get(rank) is not peer or getattr(message, "rank", None) != rank:
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

    def _arrive(self, hello: Hello, peer: Peer) -> None:
        arrival = hello.arrival
        record = self._inquiry.records.get(arrival.rank)
        present = record.arrival if record is not None and record.present else None
        if self._told is not None:
            self._gate.send(peer, encode(self._told))
        elif self._refusal:
            self._turn_away(peer, self._refusal)
        elif present is not None and present.process != arrival.process:
            self._turn_away(peer, objection([present, arrival], self._world_size))
        else:
            if present is not None:  # the same process: its goodbye is on its way in the older connection
                self._inquiry.said_goodbye(arrival.rank)
            self._hellos[arrival.rank] = hello
            self._roll.add(arrival, peer, hello.patience)

    def _turn_away(self, peer: Peer, reason: str) -> None:
        if peer in self._nodes:
            self._gate.send(peer, encode(Refused(reason)))
        else:
            self._gate.refuse(peer, reason)

    def _admit(self) -> None:
        waited = self._roll.clear()
        for arrival, door in waited:
            self._inquiry.came(arrival, self._hellos[arrival.rank].stacks_file)
            self._doors[arrival.rank] = door
        for door in dict.fromkeys(door for _, door in waited):
            self._gate.send(door, encode(Welcome()))
        self._events.append(AllArrived())

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        for door in dict.fromkeys(door for _, door in self._roll.clear()):
            self._turn_away(door, reason)
        self._events.append(Refusal(reason))

    def _lose(self, peer: Peer, why: str) -> None:
        for arrival in self._roll.remove(peer):
            if arrival.rank in self._inquiry.records:
                self._inquiry.lost(arrival.rank, why, arrival)
        if peer.name is not None:
            self._shut(peer.name, peer, why)

    def _shut(self, rank: int, peer: Peer, why: str) -> None:
        if self._doors.get(rank) is peer:
            del self._doors[rank]
            self._inquiry.lost(rank, why)

    def _lose_node(self, peer: Peer, why: str) -> None:
        node = self._nodes.pop(peer)
        self._roll.remove(peer)
        for rank in [rank for rank, door in self._doors.items() if door is peer]:
            del self._doors[rank]
        if not self._finished and not self._refusal:
            self._inquiry.node_lost(node.ranks, f"was lost with node {node.rank} ({node.host}): {why}")

    def _keep_links(self) -> None:
        for peer, node in list(self._nodes.items()):
            self._gate.send(peer, encode(NodeBeat()))
            if self._silence(node) > self._limits.link and not self._finished:
                self._lose_node(peer, f"nothing was heard from it for {self._silence(node):.0f} s")
        for rank, (ranks, until) in list(self._expected.items()):
            if self._clock() > until and not self._finished:
                del self._expected[rank]
                self._inquiry.node_lost(ranks, f"was lost with node {rank}, which did not connect to this one")

    def _silence(self, node: _Node) -> float:
        return self._inquiry.watch.age(node.heard)

    def _ask_stacks(self) -> None:
        for door in dict.fromkeys(self._doors.values()):
            self._gate.send(door, encode(AskStacks()))


class _Node:
    """A relay that is connected."""

    def __init__(self, hello: NodeHello, world_size: int, now: float) -> None:
        self.rank = hello.node_rank
        self.host = hello.host
        self.ranks = frozenset(rank for rank in hello.ranks if 0 <= rank < world_size)
        self.heard = now
