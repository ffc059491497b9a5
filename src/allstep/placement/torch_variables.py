"""The variables that torchrun defined and `allstep run` sets too, read and checked as one consistent set.

RANK of WORLD_SIZE over all nodes; LOCAL_RANK of LOCAL_WORLD_SIZE on this node; GROUP_RANK of GROUP_WORLD_SIZE says
which node; the ranks meet at MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Launcher, Placement, Rendezvous
from allstep.placement.variables import fail, index, integer, port, text


def place_by_torch_variables(
    environ: Mapping[str, str], *, launcher: Launcher, run_id: str, attempt: int, remedy: str
) -> Placement:
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
    if nodes == 1 and local_world_size != world_size:
        problem = f"all ranks of a single node are local, but WORLD_SIZE is {world_size}"
        fail(environ, "LOCAL_WORLD_SIZE", problem, remedy)
    if nodes == 1 and local_rank != rank:
        fail(environ, "LOCAL_RANK", f"on a single node it equals RANK, which is {rank}", remedy)
    if local_world_size + nodes - 1 > world_size:
        problem = f"{nodes} nodes with that many on this one need more ranks than WORLD_SIZE, which is {world_size}"
        fail(environ, "LOCAL_WORLD_SIZE", problem, remedy)


def _agent_store(environ: Mapping[str, str], remedy: str) -> bool:
    said = environ.get("TORCHELASTIC_USE_AGENT_STORE", "False")
    if said not in ("True", "False"):
        fail(environ, "TORCHELASTIC_USE_AGENT_STORE", "it must be True or False", remedy)
    return said == "True"
