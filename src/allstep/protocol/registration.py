"""What each rank says when it arrives, and whether those that arrived can work together: pure functions.

Contract: every rank introduces itself with one `Registration`; the service that all of them reach asks `objection` for
each set of arrivals, and `absent` when it has waited long enough. So all ranks go on, or all are turned away with the
same words, before any of them opens a process group that could hang.

The ranks that have arrived and wait for the others: when they may go on, or are turned away.

Contract: `add` each arrival, with the door it came through; ask `verdict` after each and when `deadline` has passed.
An objection waits a moment before it is pronounced, so that it names as many ranks as it concerns. It is dropped when
those that it is about have gone: the others then have the time that they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_NAMED = 16


@dataclass(frozen=True, slots=True)
class Registration:
    """One rank, as it introduces itself.

    `accelerator` identifies the physical CUDA device it will use (its UUID); None on other devices. `facts` are what
    all ranks must agree on, by name: the digest of a configuration file, the value of a setting.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    device_type: str
    backend: str
    accelerator: str | None = None
    local_rank: int = 0
    node_rank: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def process(self) -> str:
        """Which process it is, for comparing and for errors."""
        return f"process {self.pid} on {self.host}"


def objection(arrivals: Sequence[Registration], world_size: int | None = None) -> str:
    """Why these ranks cannot form a process group, or not with each other; empty where nothing speaks against it.

    Args:
        arrivals: those that have come so far, in the order they came.
        world_size: the number of ranks that was started, where the caller knows it.
    """
    first = arrivals[0]
    return (
        _world_sizes(arrivals, first.world_size if world_size is None else world_size)
        or _strangers(arrivals)
        or _duplicates(arrivals)
        or _backends(arrivals)
        or _facts(arrivals)
        or _accelerators(arrivals)
    )


def absent(arrivals: Iterable[Registration], world_size: int, waited: float) -> str:
    """Who did not come in `waited` seconds; empty where all are there."""
    missing = sorted(set(range(world_size)) - {arrival.rank for arrival in arrivals})
    if not missing:
        return ""
    return (
        f"{len(missing)} of {world_size} ranks did not arrive within {waited:g} s: {spans(missing)}; check that their "
        "processes started, can reach rank 0's host, and call init; or give init a longer timeout"
    )


def doubled(rank: int, first: str, second: str) -> str:
    """Two processes are one rank."""
    return (
        f"two processes are rank {rank}: {first} and {second}; give each process its own RANK, or each job its own "
        "MASTER_PORT"
    )


def spans(ranks: Iterable[int]) -> str:
    """Ranks as text: `0, 2-5`; at most a line of them."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return ", ".join(texts[:_NAMED]) + (", ..." if len(texts) > _NAMED else "")


def _world_sizes(arrivals: Sequence[Registration], expected: int) -> str:
    first = arrivals[0]
    for arrival in arrivals:
        if arrival.world_size != first.world_size:
            return (
                f"ranks {first.rank} and {arrival.rank} disagree about world_size: {first.world_size} in "
                f"{first.process}, {arrival.world_size} in {arrival.process}; start all ranks with the same number "
                "of processes"
            )
        if arrival.world_size != expected:
            return (
                f"rank {arrival.rank} ({arrival.process}) takes the world to have {arrival.world_size} ranks, and "
                f"{expected} were started; do not change WORLD_SIZE in the script"
            )
    return ""


def _strangers(arrivals: Sequence[Registration]) -> str:
    for arrival in arrivals:
        if not 0 <= arrival.rank < arrival.world_size:
            return (
                f"{arrival.process} says it is rank {arrival.rank} of a world of {arrival.world_size}, which has no "
                "such rank; check RANK and WORLD_SIZE"
            )
    return ""


def _duplicates(arrivals: Sequence[Registration]) -> str:
    owners: dict[int, Registration] = {}
    for arrival in arrivals:
        owner = owners.setdefault(arrival.rank, arrival)
        if owner is not arrival:
            return doubled(arrival.rank, owner.process, arrival.process)
    return ""


def _backends(arrivals: Sequence[Registration]) -> str:
    first = arrivals[0]
    for arrival in arrivals:
        if arrival.backend != first.backend:
            return (
                f"ranks {first.rank} and {arrival.rank} disagree about backend: {first.backend!r} in {first.process}, "
                f"{arrival.backend!r} in {arrival.process}; give all ranks the same environment and arguments of init"
            )
    return ""


def _facts(arrivals: Sequence[Registration]) -> str:
    first = arrivals[0].facts
    differing: str | None = None
    for arrival in arrivals:
        if arrival.facts != first:
            keys = sorted(first.keys() | arrival.facts.keys())
            differing = next(key for key in keys if first.get(key) != arrival.facts.get(key))
            break
    if differing is None:
        return ""
    values: dict[str | None, list[int]] = {}
    for arrival in sorted(arrivals, key=lambda each: each.rank):
        values.setdefault(arrival.facts.get(differing), []).append(arrival.rank)
    shown = "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}: {'not set' if value is None else repr(value)}"
        for value, ranks in values.items()
    )
    return f"ranks disagree about {differing} ({shown}); give all ranks the same"


def _accelerators(arrivals: Sequence[Registration]) -> str:
    owners: dict[str, Registration] = {}
    for arrival in arrivals:
        if arrival.backend != "nccl" or arrival.accelerator is None:
            continue
        owner = owners.setdefault(arrival.accelerator, arrival)
        if owner is not arrival:
            return (
                f"ranks {owner.rank} and {arrival.rank} ({arrival.process}) use the same CUDA device, "
                f"{arrival.accelerator}, and NCCL takes one rank per device; start one process per device, have "
                'the scheduler show each task its own, or share it with backend="gloo"'
            )
    return ""


GATHER_S = 0.3
"""Seconds between the first objection and the verdict."""

Door = TypeVar("Door")


class RollCall(Generic[Door]):
    """Those who wait to go on together."""

    def __init__(self, world_size: int, clock: Callable[[], float]) -> None:
        self._world_size = world_size
        self._clock = clock
        self._waiting: list[tuple[Registration, Door]] = []
        self._ranks: set[int] = set()
        self._patience = 0.0
        self._until = 0.0
        self._objected: float | None = None

    @property
    def waiting(self) -> list[tuple[Registration, Door]]:
        """Who waits, in the order they came."""
        return list(self._waiting)

    @property
    def missing(self) -> set[int]:
        """The ranks that those who wait are waiting for; empty where nobody waits."""
        return set(range(self._world_size)) - self._ranks if self._waiting else set()

    def add(self, arrival: Registration, door: Door, patience: float) -> None:
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

    def remove(self, door: Door) -> list[Registration]:
        """A door closed; return who had come through it."""
        return self._remove(lambda arrival, through: through is door)

    def remove_rank(self, rank: int) -> list[Registration]:
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

    def clear(self) -> list[tuple[Registration, Door]]:
        """Let all go; return who waited."""
        waited, self._waiting, self._ranks = self._waiting, [], set()
        return waited

    def _remove(self, is_gone: Callable[[Registration, Door], bool]) -> list[Registration]:
        gone = [arrival for arrival, door in self._waiting if is_gone(arrival, door)]
        self._waiting = [(arrival, door) for arrival, door in self._waiting if not is_gone(arrival, door)]
        stay = [arrival for arrival, _ in self._waiting]
        self._ranks = {arrival.rank for arrival in stay}
        if self._objected is not None and not (stay and objection(stay, self._world_size)):
            self._objected = None
        return gone
