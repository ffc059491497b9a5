"""Letting the ranks of a world begin: all at once when they have come and fit, or none, all with the same reason.

The hub reports who introduced itself through which connection, and which connection closed. A rank's connection is its
own, or that of its node's relay. `decide` is called whenever something came or time has passed. A rank that was let in
has its connection in `peers` and may send through no other. Once the ranks were refused, every later one is told the
same reason.

`RollCall` is the decision itself: who waits, and whether they may go on. It has no sockets.
"""

from __future__ import annotations

from collections.abc import Callable

from allstep.monitor.failure_detector import FailureDetector
from allstep.monitor.service import AllArrived, MonitorEvent
from allstep.protocol.messages import RankHello, Refused, Welcome, encode
from allstep.protocol.registration import RankRegistration, absent, objection
from allstep.protocol.server import MessageServer, Peer

GATHER_S = 0.3
"""Seconds between the first objection and the refusal, so that one message names all ranks that it concerns."""


class Admission:
    """Ranks that wait to begin, ranks that were let in, and how both are told."""

    def __init__(
        self,
        server: MessageServer,
        detector: FailureDetector,
        world_size: int,
        clock: Callable[[], float],
        events: list[MonitorEvent],
    ) -> None:
        self.peers: dict[int, Peer] = {}
        self.refusal = ""
        self._server = server
        self._detector = detector
        self._world_size = world_size
        self._events = events
        self._roll = RollCall(world_size, clock)
        self._hellos: dict[int, RankHello] = {}

    @property
    def missing(self) -> set[int]:
        """The ranks that others wait for."""
        return self._roll.missing

    def deadline(self) -> float | None:
        """When `decide` has to be called though no further rank came."""
        return self._roll.deadline()

    def connections(self) -> set[Peer]:
        """The connections of all that were let in or wait."""
        return {*self.peers.values(), *(peer for _, peer in self._roll.waiting)}

    def arrive(self, hello: RankHello, peer: Peer) -> None:
        """A rank introduced itself."""
        registration = hello.registration
        record = self._detector.records.get(registration.rank)
        present = record.registration if record is not None and record.present else None
        if self.refusal:
            self._turn_away(peer, self.refusal)
        elif present is not None and present.process != registration.process:
            self._turn_away(peer, objection([present, registration], self._world_size))
        else:
            if present is not None:
                # The same process opens its next World. Its goodbye is still on its way in the older connection.
                self._detector.said_goodbye(registration.rank)
            self._hellos[registration.rank] = hello
            self._roll.add(registration, peer, hello.patience)

    def decide(self) -> None:
        """Let all ranks begin, or refuse all, if it is time for that."""
        decision = self._roll.decision()
        if decision is not None:
            self._refuse(decision) if decision else self._admit()

    def close_peer(self, peer: Peer, why: str) -> None:
        """A connection is over."""
        for registration in self._roll.remove(peer):
            if registration.rank in self._detector.records:
                self._detector.lost(registration.rank, why, registration)
        if peer.rank is not None:
            self._remove(peer.rank, peer, why)

    def lose_rank(self, rank: int, peer: Peer, why: str) -> None:
        """A relay reports that a rank behind it is gone."""
        for registration in self._roll.remove_rank(rank):
            self._detector.lost(rank, why, registration)
        self._remove(rank, peer, why)

    def lose_relay(self, peer: Peer) -> None:
        """A relay is gone, with the ranks behind it."""
        self._roll.remove(peer)
        for rank in [rank for rank, each in self.peers.items() if each is peer]:
            del self.peers[rank]

    def _admit(self) -> None:
        waited = self._roll.clear()
        for registration, peer in waited:
            self._detector.admitted(registration, self._hellos[registration.rank].stacks_file)
            self.peers[registration.rank] = peer
        for peer in dict.fromkeys(peer for _, peer in waited):  # a relay passes one welcome on to all of its ranks
            self._server.send(peer, encode(Welcome()))
        self._events.append(AllArrived())

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        for peer in dict.fromkeys(peer for _, peer in self._roll.clear()):
            self._turn_away(peer, reason)

    def _turn_away(self, peer: Peer, reason: str) -> None:
        if peer.rank is None:  # a relay, whose connection stays: it has other ranks to tell
            self._server.send(peer, encode(Refused(reason)))
        else:
            self._server.refuse(peer, reason)

    def _remove(self, rank: int, peer: Peer, why: str) -> None:
        # A rank that came again has a new connection by now; the end of its old one says nothing.
        if self.peers.get(rank) is peer:
            del self.peers[rank]
            self._detector.lost(rank, why)


class RollCall:
    """Ranks that have come and wait for the others.

    `add` each registration with its connection, and ask `decision` after each and when `deadline` has passed. An
    objection waits for `GATHER_S` before it is spoken. It is dropped when the ranks that it is about have gone: the
    others then have the time that they were given.
    """

    def __init__(self, world_size: int, clock: Callable[[], float]) -> None:
        self._world_size = world_size
        self._clock = clock
        self._waiting: list[tuple[RankRegistration, Peer]] = []
        self._ranks: set[int] = set()
        self._patience = 0.0
        self._until = 0.0
        self._objected: float | None = None

    @property
    def waiting(self) -> list[tuple[RankRegistration, Peer]]:
        """Who waits, in the order they came."""
        return list(self._waiting)

    @property
    def missing(self) -> set[int]:
        """The ranks that are waited for; empty where none waits."""
        return set(range(self._world_size)) - self._ranks if self._waiting else set()

    def add(self, registration: RankRegistration, peer: Peer, patience: float) -> None:
        """A rank came, and gives the others `patience` seconds."""
        now = self._clock()
        if not self._waiting:
            self._patience, self._until, self._objected = patience, now + patience, None
        # Comparing with the first one is enough to notice, and keeps thousands of ranks from being compared pairwise.
        together = [*(first for first, _ in self._waiting[:1]), registration]
        fits = registration.rank not in self._ranks and not objection(together, self._world_size)
        if not fits and self._objected is None:
            self._objected = now
        self._waiting.append((registration, peer))
        self._ranks.add(registration.rank)

    def remove(self, peer: Peer) -> list[RankRegistration]:
        """A connection closed; return who had come through it."""
        return self._remove(lambda registration, through: through is peer)

    def remove_rank(self, rank: int) -> list[RankRegistration]:
        """A rank is gone whose connection serves others too; return its registrations."""
        return self._remove(lambda registration, through: registration.rank == rank)

    def deadline(self) -> float | None:
        """When `decision` changes though no further rank comes."""
        if not self._waiting:
            return None
        return self._until if self._objected is None else min(self._until, self._objected + GATHER_S)

    def decision(self) -> str | None:
        """None: wait on. Empty: all have come and fit. Else the reason why they cannot go on."""
        until = self.deadline()
        if until is None:
            return None
        late = self._clock() >= until
        if not late and (len(self._waiting) < self._world_size or len(self._ranks) < self._world_size):
            return None
        registrations = [registration for registration, _ in self._waiting]
        return objection(registrations, self._world_size) or absent(registrations, self._world_size, self._patience)

    def clear(self) -> list[tuple[RankRegistration, Peer]]:
        """Let all go; return who waited."""
        waited, self._waiting, self._ranks = self._waiting, [], set()
        return waited

    def _remove(self, is_gone: Callable[[RankRegistration, Peer], bool]) -> list[RankRegistration]:
        gone = [each for each, peer in self._waiting if is_gone(each, peer)]
        self._waiting = [(each, peer) for each, peer in self._waiting if not is_gone(each, peer)]
        stay = [each for each, _ in self._waiting]
        self._ranks = {each.rank for each in stay}
        if self._objected is not None and not (stay and objection(stay, self._world_size)):
            self._objected = None
        return gone
