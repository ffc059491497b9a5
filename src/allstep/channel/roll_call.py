"""The ranks that have arrived and wait for the others: when they may go on, or are turned away.

Contract: `add` each arrival, with the door it came through; ask `verdict` after each and when `deadline` has passed.
An objection waits a moment before it is pronounced, so that it names as many ranks as it concerns. It is dropped when
those that it is about have gone: the others then have the time that they were given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from allstep.channel.arrival import Arrival, absent, objection

GATHER_S = 0.3
"""Seconds between the first objection and the verdict."""

Door = TypeVar("Door")


class RollCall(Generic[Door]):
    """Those who wait to go on together."""

    def __init__(self, world_size: int, clock: Callable[[], float]) -> None:
        self._world_size = world_size
        self._clock = clock
        self._waiting: list[tuple[Arrival, Door]] = []
        self._ranks: set[int] = set()
        self._patience = 0.0
        self._until = 0.0
        self._objected: float | None = None

    @property
    def waiting(self) -> list[tuple[Arrival, Door]]:
        """Who waits, in the order they came."""
        return list(self._waiting)

    @property
    def missing(self) -> set[int]:
        """The ranks that those who wait are waiting for; empty where nobody waits."""
        return set(range(self._world_size)) - self._ranks if self._waiting else set()

    def add(self, arrival: Arrival, door: Door, patience: float) -> None:
        """Somebody arrived, and gives the others `patience` seconds."""
        now = self._clock()
        if not self._waiting:
            self._patience, self._until, self._objected = patience, now + patience, None
        together = [*(first for first, _ in self._waiting[:1]), arrival]
        fits = arrival.rank not in self._ranks and not objection(together, self._world_size)
        if not fits and self._objected is None:
            self._objected = now
        self._waiting.append((arrival, door))
        self._ranks.add(arrival.rank)

    def remove(self, door: Door) -> list[Arrival]:
        """A door closed; return who had come through it."""
        return self._remove(lambda arrival, through: through is door)

    def remove_rank(self, rank: int) -> list[Arrival]:
        """A rank is gone, which came through a door of many; return its arrivals."""
        return self._remove(lambda arrival, through: arrival.rank == rank)

    def deadline(self) -> float | None:
        """When `verdict` will say something though nobody else comes."""
        if not self._waiting:
            return None
        return self._until if self._objected is None else min(self._until, self._objected + GATHER_S)

    def verdict(self) -> str | None:
        """None: wait on. Empty: all are there and fit. Else why they cannot go on."""
        until = self.deadline()
        if until is None:
            return None
        late = self._clock() >= until
        if not late and (len(self._waiting) < self._world_size or len(self._ranks) < self._world_size):
            return None
        arrivals = [arrival for arrival, _ in self._waiting]
        return objection(arrivals, self._world_size) or absent(arrivals, self._world_size, self._patience)

    def clear(self) -> list[tuple[Arrival, Door]]:
        """Let all go; return who waited."""
        waited, self._waiting, self._ranks = self._waiting, [], set()
        return waited

    def _remove(self, is_gone: Callable[[Arrival, Door], bool]) -> list[Arrival]:
        gone = [arrival for arrival, door in self._waiting if is_gone(arrival, door)]
        self._waiting = [(arrival, door) for arrival, door in self._waiting if not is_gone(arrival, door)]
        stay = [arrival for arrival, _ in self._waiting]
        self._ranks = {arrival.rank for arrival in stay}
        if self._objected is not None and not (stay and objection(stay, self._world_size)):
            self._objected = None
        return gone
