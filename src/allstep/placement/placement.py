"""What a process needs to know about its place in a job, as a value, and what answers it.

Contract: a `Placement` that exists is consistent: its numbers fit together, checked when it is made. `detect` makes one
from an environment mapping, without connecting to anything; `allstep.world` uses it to choose a device and to meet the
other ranks. Each launcher is a `LauncherEnvironment` in a file of its own: it says whether a process is one of its own,
and if so, where that is.

`derive_ports` is for launchers that hand out no port: all ranks of a job can name the same candidates without having
spoken. They are a function of the job's name alone. They stay out of the kernel's ephemeral ports (32768-60999), of
SLURM's own (6817-6818), of torchrun's defaults (29400, 29500) and of what Kubernetes gives to services (30000-32767).
Two jobs on one node may still derive the same one, or a service may sit on it, so there are several, tried in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from allstep.errors import ArgumentError

Launcher = Literal["alone", "allstep", "torchrun", "slurm", "mpi", "xla", "kubernetes"]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of a job meet.

    `ports` are tried in order; there is more than one only where nobody could reserve one beforehand (a SLURM step).
    `agent_store` is true where the launcher's own process serves the store, so that rank 0 is a client like the others.
    """

    host: str
    ports: tuple[int, ...]
    agent_store: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rank this process is, among how many, on which node, and where the ranks meet.

    `rendezvous` is None only in a world of one that needs none. `run_id` and `attempt` name the job and its current
    start; every rank of one start has the same two.
    `warnings` are about the environment; whoever calls `detect` should show them.

    Raises:
        ArgumentError: the numbers do not fit together.
    """

    launcher: Launcher
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    nodes: int = 1
    rendezvous: Rendezvous | None = None
    run_id: str = ""
    attempt: int = 0
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (  # name, value, and the first number that is too large
            ("rank", self.rank, self.world_size),
            ("local_rank", self.local_rank, self.local_world_size),
            ("node_rank", self.node_rank, self.nodes),
            ("local_world_size - 1", self.local_world_size - 1, self.world_size),
            ("nodes - 1", self.nodes - 1, self.world_size),
        )
        for name, value, end in checks:
            if not 0 <= value < end:
                raise ArgumentError(f"{name} is {value}; it must be at least 0 and less than {end}, in {self!r}")
        if self.world_size > 1 and self.rendezvous is None:
            raise ArgumentError(f"a world of {self.world_size} needs a place to meet, but rendezvous is None")


class LauncherEnvironment(Protocol):
    """One way in which processes are started, told by its environment variables. Both methods are pure."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether variables of this launcher are there, however broken."""
        ...

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The process's place; raises PlacementError where the variables are missing, garbage or contradictory."""
        ...


FIRST_PORT, END_PORT = 20000, 29000
CANDIDATES = 8
"""How many ports are derived for a job."""


def derive_ports(job: str) -> tuple[int, ...]:
    """`CANDIDATES` different ports in [FIRST_PORT, END_PORT) for the job of this name, the same on every rank."""
    ports: dict[int, None] = {}  # a set that keeps its order, which has to be the same on every rank
    trial = 0
    while len(ports) < CANDIDATES:
        digest = hashlib.sha256(f"{job}/{trial}".encode()).digest()
        ports[FIRST_PORT + int.from_bytes(digest[:8], "big") % (END_PORT - FIRST_PORT)] = None
        trial += 1
    return tuple(ports)
