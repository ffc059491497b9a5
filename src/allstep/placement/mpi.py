"""Started by an MPI launcher: Open MPI's mpirun, or Hydra (MPICH, Intel MPI) and others that set PMI variables.

They say the rank and which ranks share a node, and neither where to meet nor which node this is. On one node the
ranks meet on the loopback at a derived port; over several MASTER_ADDR and MASTER_PORT are needed. Inside a SLURM job
mpirun starts its own daemons by srun, so the STEP variables that its ranks see are the daemons': these come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from allstep.placement.placement import Placement, Rendezvous, derive_ports
from allstep.placement.variables import agree, fail, index, integer, port, text

_JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
_UNNAMED_JOB = (
    "this MPI launcher gives its jobs no name, so two on one machine would meet at the same port;"
    " set MASTER_ADDR=127.0.0.1 and MASTER_PORT to be sure"
)
_UNEVEN = "MPI does not say how ranks are spread over nodes, and they are not even here: the node rank is a guess"


@dataclass(frozen=True, slots=True)
class MpiLauncher:
    """One family of MPI launchers, by the names of its variables."""

    rank: str
    size: str
    local_rank: str
    local_size: str

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether any of the family's variables is set."""
        return any(name in environ for name in (self.rank, self.local_rank, self.local_size))

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The rank's place; raises PlacementError, also for several nodes without MASTER_ADDR and MASTER_PORT."""
        remedy = f"The MPI launcher sets it: start the script with mpirun or mpiexec, or unset {self.rank}"
        world_size = integer(environ, self.size, remedy, least=1)
        rank = index(environ, self.rank, world_size, self.size, remedy)
        # PMI alone says nothing about nodes, which a world of one does not need.
        if world_size == 1 and self.local_size not in environ:
            local_rank, local_world_size = 0, 1
        else:
            local_world_size = integer(environ, self.local_size, remedy, least=1)
            if local_world_size > world_size:
                fail(environ, self.local_size, f"it is more than {self.size}, which is {world_size}", remedy)
            local_rank = index(environ, self.local_rank, local_world_size, self.local_size, remedy)
        # Variables for torch that contradict MPI's were exported once and inherited by all ranks.
        agree(environ, "WORLD_SIZE", world_size, self.size)
        agree(environ, "LOCAL_RANK", local_rank, self.local_rank)
        agree(environ, "LOCAL_WORLD_SIZE", local_world_size, self.local_size)
        node_rank, nodes, even = _node(rank, world_size, local_rank, local_world_size)
        job = next((environ[name] for name in _JOB_NAMES if environ.get(name)), "")
        rendezvous = _rendezvous(environ, nodes, job) if world_size > 1 else None
        unnamed = not job and rendezvous is not None and "MASTER_PORT" not in environ
        return Placement(
            launcher="mpi",
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            node_rank=node_rank,
            nodes=nodes,
            rendezvous=rendezvous,
            run_id=job or "mpi",
            warnings=(_UNNAMED_JOB,) * unnamed + (_UNEVEN,) * (not even),
        )


OPEN_MPI = MpiLauncher(
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
)
HYDRA = MpiLauncher(rank="PMI_RANK", size="PMI_SIZE", local_rank="MPI_LOCALRANKID", local_size="MPI_LOCALNRANKS")
CRAY = MpiLauncher(rank="PMI_RANK", size="PMI_SIZE", local_rank="PMI_LOCAL_RANK", local_size="PMI_LOCAL_SIZE")


def _node(rank: int, world_size: int, local_rank: int, local_world_size: int) -> tuple[int, int, bool]:
    """Node rank and number of nodes as the mapping by slot or by node gives them, and whether one of those fits."""
    nodes = -(-world_size // local_world_size)  # rounded up: the last node may have fewer
    if world_size % local_world_size == 0:
        if rank % local_world_size == local_rank:  # by slot: a node is filled before the next
            return rank // local_world_size, nodes, True
        if rank // nodes == local_rank:  # by node: one rank to each in turn
            return rank % nodes, nodes, True
    return min(rank // local_world_size, nodes - 1), nodes, False


def _rendezvous(environ: Mapping[str, str], nodes: int, job: str) -> Rendezvous:
    if nodes > 1 or "MASTER_ADDR" in environ or "MASTER_PORT" in environ:
        remedy = "Give every rank MASTER_ADDR, the host of rank 0, and MASTER_PORT, a free port there"
        return Rendezvous(host=text(environ, "MASTER_ADDR", remedy), ports=(port(environ, "MASTER_PORT", remedy),))
    return Rendezvous(host="127.0.0.1", ports=derive_ports(f"mpi {job}"))


class Mpi:
    """A rank of an MPI launcher of any family."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether one family's variables are there, and not only those that srun sets for MPI programs in a step."""
        return self._family(environ) is not None

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The rank's place; raises PlacementError."""
        family = self._family(environ)
        assert family is not None, "place is called after matches"
        return family.place(environ)

    def _family(self, environ: Mapping[str, str]) -> MpiLauncher | None:
        # Hydra and Cray share the rank's variable, so that only the local ones tell them apart.
        if OPEN_MPI.matches(environ):
            return OPEN_MPI
        if HYDRA.local_rank in environ or HYDRA.local_size in environ:
            return HYDRA
        if CRAY.local_rank in environ or CRAY.local_size in environ:
            return CRAY
        # srun --mpi=pmi2 sets PMI_RANK for every task, MPI program or not.
        started_by_srun = "SLURM_STEP_NUM_TASKS" in environ
        return HYDRA if HYDRA.rank in environ and not started_by_srun else None
