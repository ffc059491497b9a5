"""A pod of a Kubernetes Job whose pods are numbered (`completionMode: Indexed`).

Kubernetes tells each pod of such a Job its number, in JOB_COMPLETION_INDEX, and nothing else about the others: neither
how many there are nor where they are. So the pods' template says that. Members of a sweep are numbered in the same way
and have nothing to do with each other, which is why the number alone makes no pod a rank.

- Under `allstep run --nnodes N --rdzv HOST:PORT` the number is the node rank (`completion_index`).
- Where each pod runs the script itself, the template gives WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and the number is
  the rank (`KubernetesPod`). A RANK that is set comes before it: those are started by hand, or by torchrun.

What can go wrong is a PlacementError that names the variable.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Placement, Rendezvous
from allstep.placement.variables import agree, index, integer, port, text

INDEX = "JOB_COMPLETION_INDEX"

_REMEDY = (
    f"A pod for each rank needs WORLD_SIZE, MASTER_ADDR (the name of the pod with {INDEX}=0) and MASTER_PORT in the"
    " Job's template; or run `allstep run` in each pod"
)


def completion_index(environ: Mapping[str, str], count: int, counted: str) -> int | None:
    """Which of `count` pods of an Indexed Job this one is, or None outside of one; `counted` says the count."""
    if INDEX not in environ:
        return None
    return index(environ, INDEX, count, counted, f"The Job needs as many completions as {counted} says")


class KubernetesPod:
    """A pod that is a rank of its own."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether the pod has a number and is told of others, and nobody says its rank."""
        return INDEX in environ and "WORLD_SIZE" in environ and "RANK" not in environ

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The pod's place; raises PlacementError."""
        world_size = integer(environ, "WORLD_SIZE", _REMEDY, least=1)
        rank = index(environ, INDEX, world_size, "WORLD_SIZE", _REMEDY)
        agree(environ, "LOCAL_RANK", 0, "a pod for each rank")
        agree(environ, "LOCAL_WORLD_SIZE", 1, "a pod for each rank")
        if world_size == 1:
            return Placement(launcher="kubernetes")
        host, meeting_port = text(environ, "MASTER_ADDR", _REMEDY), port(environ, "MASTER_PORT", _REMEDY)
        return Placement(
            launcher="kubernetes",
            rank=rank,
            world_size=world_size,
            node_rank=rank,
            nodes=world_size,
            rendezvous=Rendezvous(host=host, ports=(meeting_port,)),
            run_id=f"{host}:{meeting_port}",
        )
