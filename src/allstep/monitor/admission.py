"""Letting the ranks of a world in: all at once, when they have arrived and fit, or none, all with the same reason.

Contract: the hub says who arrived through which door (a rank's own connection, or that of its node's relay), and whose
door closed; `decide` is called whenever something came or time has passed. A rank that was let in has its door in
`doors`, and may speak through no other. Once ranks were refused, everybody who comes later hears the same.
"""

from __future__ import annotations

from collections.abc import Callable

from allstep.monitor.failure_detector import FailureDetector
from allstep.monitor.service import AllArrived, HubEvent
from allstep.protocol.messages import Hello, Refused, Welcome, encode
from allstep.protocol.registration import RollCall, objection
from allstep.protocol.server import MessageServer, Peer


class Admission:
    """The way in, for the ranks of a hub."""

    def __init__(
        self,
        gate: MessageServer,
        inquiry: FailureDetector,
        world_size: int,
        clock: Callable[[], float],
        events: list[HubEvent],
    ) -> None:
        self.doors: dict[int, Peer] = {}
        self.refusal = ""
        self._gate = gate
        self._inquiry = inquiry
        self._world_size = world_size
        self._events = events
        self._roll: RollCall[Peer] = RollCall(world_size, clock)
        self._hellos: dict[int, Hello] = {}

    @property
    def missing(self) -> set[int]:
        """The ranks that others wait for."""
        return self._roll.missing

    def deadline(self) -> float | None:
        """When `decide` has something to say though nobody else comes."""
        return self._roll.deadline()

    def everybody(self) -> set[Peer]:
        """The doors of all that were let in or wait."""
        return {*self.doors.values(), *(door for _, door in self._roll.waiting)}

    def arrive(self, hello: Hello, peer: Peer) -> None:
        """A rank introduced itself."""
        arrival = hello.arrival
        record = self._inquiry.records.get(arrival.rank)
        present = record.arrival if record is not None and record.present else None
        if self.refusal:
            self._turn_away(peer, self.refusal)
        elif present is not None and present.process != arrival.process:
            self._turn_away(peer, objection([present, arrival], self._world_size))
        else:
            if present is not None:  # the same process: its goodbye is on its way in the older connection
                self._inquiry.said_goodbye(arrival.rank)
            self._hellos[arrival.rank] = hello
            self._roll.add(arrival, peer, hello.patience)

    def decide(self) -> None:
        """Let all in, or turn all away, if it is time for that."""
        verdict = self._roll.verdict()
        if verdict is not None:
            self._refuse(verdict) if verdict else self._admit()

    def close_door(self, peer: Peer, why: str) -> None:
        """A connection is over."""
        for arrival in self._roll.remove(peer):
            if arrival.rank in self._inquiry.records:
                self._inquiry.lost(arrival.rank, why, arrival)
        if peer.name is not None:
            self._shut(peer.name, peer, why)

    def lose_rank(self, rank: int, peer: Peer, why: str) -> None:
        """A relay says that a rank behind it is gone."""
        for arrival in self._roll.remove_rank(rank):
            self._inquiry.lost(rank, why, arrival)
        self._shut(rank, peer, why)

    def lose_relay(self, peer: Peer) -> None:
        """A relay is gone, with the ranks behind it."""
        self._roll.remove(peer)
        for rank in [rank for rank, door in self.doors.items() if door is peer]:
            del self.doors[rank]

    def _admit(self) -> None:
        waited = self._roll.clear()
        for arrival, door in waited:
            self._inquiry.came(arrival, self._hellos[arrival.rank].stacks_file)
            self.doors[arrival.rank] = door
        for door in dict.fromkeys(door for _, door in waited):
            self._gate.send(door, encode(Welcome()))
        self._events.append(AllArrived())

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        for door in dict.fromkeys(door for _, door in self._roll.clear()):
            self._turn_away(door, reason)

    def _turn_away(self, peer: Peer, reason: str) -> None:
        if peer.name is None:  # a relay, which has other ranks to tell
            self._gate.send(peer, encode(Refused(reason)))
        else:
            self._gate.refuse(peer, reason)

    def _shut(self, rank: int, peer: Peer, why: str) -> None:
        if self.doors.get(rank) is peer:
            del self.doors[rank]
            self._inquiry.lost(rank, why)
