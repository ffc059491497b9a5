"""What a process needs to know about its place in a job, as a value.

Contract: `detect` (beside this file) makes a `Placement` from an environment mapping, without connecting to anything;
`World` uses it to choose a device and to meet the other ranks. A `Placement` that exists is consistent: its numbers
fit together, checked when it is made.

What every launcher's file answers: is this one of yours, and if so, where is it.

No launcher: one process, a world of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Launcher = Literal["alone", "allstep", "torchrun", "slurm", "mpi", "xla"]


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
    `warnings` are remarks about the environment that whoever calls `detect` should show.
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
        checks = (
            ("rank", self.rank, self.world_size),
            ("local_rank", self.local_rank, self.local_world_size),
            ("node_rank", self.node_rank, self.nodes),
            ("local_world_size - 1", self.local_world_size - 1, self.world_size),
            ("nodes - 1", self.nodes - 1, self.world_size),
        )
        for name, value, end in checks:
            if not 0 <= value < end:
                raise ValueError(f"{name} is {value}; it must be at least 0 and less than {end}, in {self!r}")
        if self.world_size > 1 and self.rendezvous is None:
            raise ValueError(f"a world of {self.world_size} needs a place to meet, but rendezvous is None")


class LauncherEnvironment(Protocol):
    """One way in which processes are started, told by its environment variables. Both methods are pure."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether variables of this launcher are there, however broken."""
        ...

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The process's place; raises PlacementError where the variables are missing, garbage or contradictory."""
        ...


class Alone:
    """What is left when no launcher's variables are there."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Always."""
        return True

    def place(self, environ: Mapping[str, str]) -> Placement:
        """A world of one, with a warning on a host of a TPU pod, whose other hosts it will not meet."""
        hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
        if environ.get("PJRT_DEVICE") != "TPU" or len(hosts) < 2:
            return Placement(launcher="alone")
        warning = (
            f"this host is one of {len(hosts)} of a TPU pod (TPU_WORKER_HOSTNAMES), but this process trains alone;"
            " start one process per device on every host with torchrun or torch_xla.launch"
        )
        return Placement(launcher="alone", warnings=(warning,))
