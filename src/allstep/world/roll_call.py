"""What each rank says when it arrives, and whether all that arrived can work together: pure functions.

Contract: every rank puts one `Arrival` into the store; rank 0 reads them all and publishes what `objection` says, so
that all ranks go on, or all raise the same error before any collective could hang.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One rank, as it introduces itself.

    `accelerator` identifies the physical CUDA device it will use (its UUID); None on other devices.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    device_type: str
    backend: str
    accelerator: str | None = None

    def to_json(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Arrival:
        """Back from `to_json`."""
        return cls(**json.loads(text))

    @property
    def process(self) -> str:
        """Which process it is, for comparing and for errors."""
        return f"process {self.pid} on {self.host}"


def objection(arrivals: Sequence[Arrival]) -> str:
    """Why these ranks cannot form a process group; empty where they can."""
    first = arrivals[0]
    owners: dict[str, Arrival] = {}
    for arrival in arrivals:
        for name in ("world_size", "backend"):
            here, there = getattr(first, name), getattr(arrival, name)
            if here != there:
                return (
                    f"ranks {first.rank} and {arrival.rank} disagree about {name}: {here!r} in {first.process}, "
                    f"{there!r} in {arrival.process}; give all ranks the same environment and arguments of init"
                )
        if arrival.backend == "nccl" and arrival.accelerator is not None:
            owner = owners.setdefault(arrival.accelerator, arrival)
            if owner is not arrival:
                return (
                    f"ranks {owner.rank} and {arrival.rank} ({arrival.process}) use the same CUDA device, "
                    f"{arrival.accelerator}, and NCCL takes one rank per device; start one process per device, have "
                    'the scheduler show each task its own, or share it with backend="gloo"'
                )
    return ""
