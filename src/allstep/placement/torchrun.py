"""torchrun, and `allstep run`, which sets the same variables.

RANK of WORLD_SIZE counts over all nodes, LOCAL_RANK of LOCAL_WORLD_SIZE on this node, and GROUP_RANK of
GROUP_WORLD_SIZE says which node; the ranks meet at MASTER_ADDR and MASTER_PORT. They are read and checked as one
consistent set.

`Torchrun` is also what starts workers through torch's elastic agent, such as `accelerate launch`. Its
TORCHELASTIC_RESTART_COUNT is counted by each node's agent: after a failure on one node only, torch lets them differ.
`allstep run` adds ALLSTEP_RUN_ID and ALLSTEP_ATTEMPT, which say who set the others and are the same on all nodes.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Launcher, Placement, Rendezvous
from allstep.placement.variables import fail, index, integer, port, text

_ALLSTEP_REMEDY = "`allstep run` sets it: start the script with that alone, or unset ALLSTEP_RUN_ID"
_TORCHRUN_REMEDY = "torchrun sets it: start the script with torchrun, or unset TORCHELASTIC_RUN_ID"


class AllstepRun:
    """A worker of `allstep run`, also where that runs inside a SLURM step."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether ALLSTEP_RUN_ID is set."""
        return "ALLSTEP_RUN_ID" in environ

    def place(self, environ: Mapping[str, str]) -> Placement:
        """Its place; raises PlacementError, also where another torchrun-like launcher has set variables since."""
        run_id = text(environ, "ALLSTEP_RUN_ID", _ALLSTEP_REMEDY)
        attempt = integer(environ, "ALLSTEP_ATTEMPT", _ALLSTEP_REMEDY)
        # `allstep run` sets both; another name means that torchrun was started by a worker, or the reverse.
        inner = environ.get("TORCHELASTIC_RUN_ID", run_id)
        if inner != run_id:
            problem = f"TORCHELASTIC_RUN_ID is {inner!r}, so torchrun and `allstep run` both claim this process"
            fail(environ, "ALLSTEP_RUN_ID", problem, "Start with one of the two, or unset the other's variables")
        if "TORCHELASTIC_RESTART_COUNT" in environ:
            restarts = integer(environ, "TORCHELASTIC_RESTART_COUNT", _ALLSTEP_REMEDY)
            if restarts != attempt:
                fail(environ, "ALLSTEP_ATTEMPT", f"TORCHELASTIC_RESTART_COUNT is {restarts}", _ALLSTEP_REMEDY)
        return _place(environ, launcher="allstep", run_id=run_id, attempt=attempt, remedy=_ALLSTEP_REMEDY)


class Torchrun:
    """A worker of torchrun, also where that runs inside a SLURM step."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether TORCHELASTIC_RUN_ID is set."""
        return "TORCHELASTIC_RUN_ID" in environ

    def place(self, environ: Mapping[str, str]) -> Placement:
        """Its place; raises PlacementError."""
        run_id = environ["TORCHELASTIC_RUN_ID"]
        if not run_id:
            fail(environ, "TORCHELASTIC_RUN_ID", "it must not be empty", _TORCHRUN_REMEDY)
        if run_id == "none":  # torchrun's default --rdzv-id, which names no job
            run_id = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
        return _place(
            environ,
            launcher="torchrun",
            run_id=run_id,
            attempt=integer(environ, "TORCHELASTIC_RESTART_COUNT", _TORCHRUN_REMEDY),
            remedy=_TORCHRUN_REMEDY,
        )


def _place(environ: Mapping[str, str], *, launcher: Launcher, run_id: str, attempt: int, remedy: str) -> Placement:
    """The place that the full set of variables says; raises PlacementError where one is missing or contradicts."""
    world_size = integer(environ, "WORLD_SIZE", remedy, least=1)
    rank = index(environ, "RANK", world_size, "WORLD_SIZE", remedy)
    local_world_size = integer(environ, "LOCAL_WORLD_SIZE", remedy, least=1)
    local_rank = index(environ, "LOCAL_RANK", local_world_size, "LOCAL_WORLD_SIZE", remedy)
    nodes = integer(environ, "GROUP_WORLD_SIZE", remedy, least=1)
    node_rank = index(environ, "GROUP_RANK", nodes, "GROUP_WORLD_SIZE", remedy)
    check_nodes(environ, rank, world_size, local_rank, local_world_size, nodes, remedy)
    rendezvous = Rendezvous(
        host=text(environ, "MASTER_ADDR", remedy),
        ports=(port(environ, "MASTER_PORT", remedy),),
        agent_store=_agent_store(environ, remedy),
    )
    return Placement(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=node_rank,
        nodes=nodes,
        rendezvous=rendezvous,
        run_id=run_id,
        attempt=attempt,
    )


def check_nodes(
    environ: Mapping[str, str],
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    nodes: int,
    remedy: str,
) -> None:
    """Raise PlacementError unless this node's ranks and at least one on each other node add up to the world."""
    # Other nodes may have any numbers of ranks, so that only these bounds can be checked from here.
    if nodes == 1 and local_world_size != world_size:
        problem = f"all ranks of a single node are local, but WORLD_SIZE is {world_size}"
        fail(environ, "LOCAL_WORLD_SIZE", problem, remedy)
    if nodes == 1 and local_rank != rank:
        fail(environ, "LOCAL_RANK", f"on a single node it equals RANK, which is {rank}", remedy)
    if local_world_size + nodes - 1 > world_size:
        problem = f"{nodes} nodes with that many on this one need more ranks than WORLD_SIZE, which is {world_size}"
        fail(environ, "LOCAL_WORLD_SIZE", problem, remedy)


def _agent_store(environ: Mapping[str, str], remedy: str) -> bool:
    """Whether the launcher's own process serves the store, as torch itself reads it: by these two words only."""
    said = environ.get("TORCHELASTIC_USE_AGENT_STORE", "False")
    if said not in ("True", "False"):
        fail(environ, "TORCHELASTIC_USE_AGENT_STORE", "it must be True or False", remedy)
    return said == "True"
