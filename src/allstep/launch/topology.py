"""Which machine of a run of several this is: from the settings, or from what started it. Pure.

Contract: the supervisor calls `find_nodes` before anything is started. It returns None for a run of this machine alone,
or a consistent `Nodes`; nothing is guessed. Settings win over variables. A SLURM step says all; a pod of a Kubernetes
Indexed Job says its node rank, and the settings the rest. What can go wrong is a ConfigurationError or PlacementError
that names the option or variable and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from allstep.errors import ConfigurationError
from allstep.launch.settings import LaunchSettings, parse_rdzv
from allstep.placement.batch_systems import USES_ALL, job_machines
from allstep.placement.kubernetes import completion_index
from allstep.placement.slurm import SlurmStep


@dataclass(frozen=True, slots=True)
class Nodes:
    """This machine's place among those of a run.

    `ports` are tried in order; several only where nobody could choose one beforehand (a SLURM step). `job` names what
    started the nodes together, empty where nothing did.
    """

    count: int
    rank: int
    host: str
    ports: tuple[int, ...]
    job: str = ""

    @property
    def head(self) -> bool:
        """Whether this machine decides for all."""
        return self.rank == 0


def find_nodes(settings: LaunchSettings, environ: Mapping[str, str]) -> Nodes | None:
    """Return this machine's place among several, or None where it is the only one."""
    if (settings.nnodes, settings.node_rank, settings.rdzv) == (None, None, None):
        return _from_slurm(environ)
    node_rank = settings.node_rank
    # Pods of a sweep are numbered too; only one that is told of others is a machine among several.
    if node_rank is None and settings.nnodes is not None and settings.nnodes > 1:
        node_rank = completion_index(environ, settings.nnodes, "nnodes")
    return _from_settings(settings, node_rank)


def warning(environ: Mapping[str, str]) -> str:
    """Say so where a job has several machines and this process was not started on each of them."""
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    if SlurmStep().matches(environ):
        return ""
    if not nodes.isdecimal() or int(nodes) < 2:
        machines = job_machines(environ)
        return f"the job has {machines} machines, but only this one is used; {USES_ALL}" if machines > 1 else ""
    return (
        f"the job has {nodes} nodes, but only this one is used, since srun did not start this process; "
        "to use them all: srun --ntasks-per-node=1 allstep run ..."
    )


def _from_settings(settings: LaunchSettings, node_rank: int | None) -> Nodes | None:
    if settings.nnodes == 1 and settings.rdzv is None and node_rank in (None, 0):
        return None  # so that a script can give --nnodes $N whatever N is
    given = {"nnodes": settings.nnodes, "node_rank": node_rank, "rdzv": settings.rdzv}
    if absent := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]:
        raise ConfigurationError(
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing: a run of several machines needs "
            "--nnodes N --node-rank K --rdzv HOST:PORT on each, where HOST is the machine of node rank 0"
        )
    assert settings.nnodes is not None  # for the type checker: none is absent
    assert node_rank is not None
    assert settings.rdzv is not None
    if node_rank >= settings.nnodes:
        raise ConfigurationError(f"node_rank is {node_rank}; it must be less than nnodes, which is {settings.nnodes}")
    if settings.nnodes == 1:
        return None
    host, port = parse_rdzv(settings.rdzv)
    return Nodes(settings.nnodes, node_rank, host, (port,))


def _from_slurm(environ: Mapping[str, str]) -> Nodes | None:
    slurm = SlurmStep()
    if not slurm.matches(environ):
        return None
    place = slurm.place(environ)
    # Two of these on a node would each take all of its devices.
    if place.local_world_size != 1:
        raise ConfigurationError(
            f"srun started {place.local_world_size} tasks on this node (SLURM_STEP_TASKS_PER_NODE), and each is an "
            "`allstep run` that would start workers of its own; start one a node, srun --ntasks-per-node=1 allstep run "
            "..., or the script itself, srun python ..."
        )
    if place.rendezvous is None:
        return None
    return Nodes(place.nodes, place.node_rank, place.rendezvous.host, place.rendezvous.ports, job=place.run_id)
