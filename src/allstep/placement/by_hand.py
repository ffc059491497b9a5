"""RANK, WORLD_SIZE and their like set by a person's script, or by a launcher that is not torchrun but speaks its words.

Such sets are often partial, and often stale: exported once and inherited by every task of a step. What is missing is
taken from the step or MPI job around, where that says the same rank and world size; is plain where all ranks are on
one node; and else is asked for. A set that a step or MPI job around contradicts is refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from allstep.placement.placement import LauncherEnvironment, Placement, Rendezvous
from allstep.placement.torchrun import check_nodes
from allstep.placement.variables import fail, index, integer, port, text

_REMEDY = "Set all of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset RANK and WORLD_SIZE and use a launcher"
_LOCAL_REMEDY = (
    "Set LOCAL_RANK and LOCAL_WORLD_SIZE for each process: its index on its node and how many are there"
    " (0 and 1 with one process a node)"
)
_GROUP_REMEDY = "Set GROUP_RANK and GROUP_WORLD_SIZE: the index of this process's node and the number of nodes"


class ByHand:
    """Ranks that were not started by torchrun but are told their place in its words.

    `around` are the launchers whose variables may surround such a set and are compared with it.
    """

    def __init__(self, around: tuple[LauncherEnvironment, ...]) -> None:
        self._around = around

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether RANK is set, or WORLD_SIZE where no launcher around says the rank."""
        if "RANK" in environ:
            return True
        return "WORLD_SIZE" in environ and not any(launcher.matches(environ) for launcher in self._around)

    def place(self, environ: Mapping[str, str]) -> Placement:
        """Its place; raises PlacementError where the set is broken, not enough, or contradicted from around."""
        world_size = integer(environ, "WORLD_SIZE", _REMEDY, least=1)
        rank = index(environ, "RANK", world_size, "WORLD_SIZE", _REMEDY)
        around = self._place_around(environ, rank, world_size)
        rendezvous = _rendezvous(environ, world_size)
        local_rank, local_world_size = _local(environ, rank, world_size, rendezvous, around)
        node_rank, nodes = _node(environ, rank, world_size, local_rank, local_world_size, around)
        check_nodes(environ, rank, world_size, local_rank, local_world_size, nodes, _LOCAL_REMEDY)
        return Placement(
            launcher="torchrun",
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            node_rank=node_rank,
            nodes=nodes,
            rendezvous=rendezvous,
            run_id=f"{rendezvous.host}:{rendezvous.ports[0]}" if rendezvous else "",
        )

    def _place_around(self, environ: Mapping[str, str], rank: int, world_size: int) -> Placement | None:
        """The same rank of the same world as a launcher around tells it, where one does."""
        # A launcher around compares these with its own variables, which is what this function is to do.
        own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        without = {name: value for name, value in environ.items() if name not in own}
        for launcher in self._around:
            if not launcher.matches(without):
                continue
            outer = launcher.place(without)  # may refuse: a broken step is no place to train either
            said = f"the {outer.launcher} variables say rank {outer.rank} of {outer.world_size}"
            remedy = "Unset RANK and WORLD_SIZE: they were probably exported before the tasks were started"
            if world_size < outer.world_size:
                fail(environ, "WORLD_SIZE", f"{said}, which is more processes than ranks", remedy)
            if world_size == outer.world_size and rank != outer.rank:
                fail(environ, "RANK", said, remedy)
            # A larger world spans several steps or jobs, and this one says nothing about its nodes.
            return outer if world_size == outer.world_size else None
        return None


def _rendezvous(environ: Mapping[str, str], world_size: int) -> Rendezvous | None:
    if world_size == 1 and "MASTER_ADDR" not in environ and "MASTER_PORT" not in environ:
        return None
    return Rendezvous(host=text(environ, "MASTER_ADDR", _REMEDY), ports=(port(environ, "MASTER_PORT", _REMEDY),))


def _local(
    environ: Mapping[str, str], rank: int, world_size: int, rendezvous: Rendezvous | None, around: Placement | None
) -> tuple[int, int]:
    if "LOCAL_WORLD_SIZE" in environ:
        count = integer(environ, "LOCAL_WORLD_SIZE", _LOCAL_REMEDY, least=1)
    elif around is not None:
        count = around.local_world_size
    elif world_size == 1 or rendezvous is None or _is_this_machine(rendezvous.host):
        count = world_size  # ranks on other machines could not reach a loopback address
    else:
        missing = "LOCAL_WORLD_SIZE" if "LOCAL_RANK" in environ else "LOCAL_RANK"
        fail(environ, missing, "nothing says which ranks share a node", _LOCAL_REMEDY)
    if "LOCAL_RANK" in environ or ("LOCAL_WORLD_SIZE" in environ and count < world_size):
        return index(environ, "LOCAL_RANK", count, "LOCAL_WORLD_SIZE", _LOCAL_REMEDY), count
    if around is not None and around.local_rank < count:
        return around.local_rank, count  # which knows of placements that are not rank after rank
    return rank % count, count


def _node(
    environ: Mapping[str, str],
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    around: Placement | None,
) -> tuple[int, int]:
    if "GROUP_RANK" in environ or "GROUP_WORLD_SIZE" in environ:
        nodes = integer(environ, "GROUP_WORLD_SIZE", _GROUP_REMEDY, least=1)
        return index(environ, "GROUP_RANK", nodes, "GROUP_WORLD_SIZE", _GROUP_REMEDY), nodes
    if around is not None and around.local_world_size == local_world_size:
        return around.node_rank, around.nodes
    nodes, left = divmod(world_size, local_world_size)
    if left or rank % local_world_size != local_rank:
        fail(environ, "GROUP_RANK", "the ranks are not spread evenly, node after node, so it is needed", _GROUP_REMEDY)
    return rank // local_world_size, nodes


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
