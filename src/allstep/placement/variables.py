"""Reading one variable of an environment, or failing with its name, its value and what to do.

Contract: the launchers beside this file call these; each returns a value that is what its name says, or raises
`PlacementError`. Nothing is defaulted silently: who wants a default asks whether the variable is there.

The variables that torchrun defined and `allstep run` sets too, read and checked as one consistent set.

RANK of WORLD_SIZE over all nodes; LOCAL_RANK of LOCAL_WORLD_SIZE on this node; GROUP_RANK of GROUP_WORLD_SIZE says
which node; the ranks meet at MASTER_ADDR and MASTER_PORT.

Ports that all ranks of a job can name without having spoken, for launchers that hand out none.

The candidates are a function of the job's name alone. They stay out of the kernel's ephemeral ports (32768-60999), of
SLURM's own (6817-6818), of torchrun's defaults (29400, 29500) and of what Kubernetes gives to services (30000-32767).
Two jobs on one node may still derive the same one, or a service may sit on it, so there are several, tried in order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import NoReturn

from allstep.errors import PlacementError
from allstep.placement.placement import Launcher, Placement, Rendezvous

_DIGITS = re.compile(r"[0-9]{1,18}\Z")


def fail(environ: Mapping[str, str], variable: str, problem: str, remedy: str) -> NoReturn:
    """Raise PlacementError: what `variable` holds, the `problem` with that, and the `remedy`."""
    value = environ.get(variable)
    said = f"{variable} is not set" if value is None else f"{variable} is {value!r}"
    raise PlacementError(f"{said}; {problem}. {remedy}", variable=variable, value=value)


def text(environ: Mapping[str, str], variable: str, remedy: str) -> str:
    """The variable's value, which must be there, not empty, and without white space."""
    value = environ.get(variable)
    if value is None:
        fail(environ, variable, "it is needed to place this process", remedy)
    if not value or re.search(r"\s", value):
        fail(environ, variable, "it must not be empty or hold white space", remedy)
    return value


def integer(environ: Mapping[str, str], variable: str, remedy: str, *, least: int = 0) -> int:
    """The variable's value as a decimal integer of at least `least`."""
    value = text(environ, variable, remedy)
    if not _DIGITS.match(value) or int(value) < least:
        fail(environ, variable, f"it must be an integer, {least} or more, in decimal digits", remedy)
    return int(value)


def index(environ: Mapping[str, str], variable: str, count: int, counted: str, remedy: str) -> int:
    """The variable's value as an integer in [0, count); `counted` is the variable that says the count."""
    value = integer(environ, variable, remedy)
    if value >= count:
        fail(environ, variable, f"it must be less than {counted}, which is {count}", remedy)
    return value


def port(environ: Mapping[str, str], variable: str, remedy: str) -> int:
    """The variable's value as a TCP port, 1 to 65535."""
    value = integer(environ, variable, remedy, least=1)
    if value > 65535:
        fail(environ, variable, "a port is at most 65535", remedy)
    return value


def agree(environ: Mapping[str, str], variable: str, expected: int, said_by: str) -> None:
    """Raise PlacementError where the variable is set and is not `expected`, which `said_by` says."""
    if variable in environ:
        remedy = f"Unset {variable}: it was probably exported before the processes were started"
        if integer(environ, variable, remedy) != expected:
            fail(environ, variable, f"{said_by} says {expected}", remedy)


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


FIRST_PORT, END_PORT = 20000, 29000
CANDIDATES = 8


def derive_ports(job: str) -> tuple[int, ...]:
    """`CANDIDATES` different ports in [FIRST_PORT, END_PORT) for the job of this name, the same on every rank."""
    ports: dict[int, None] = {}
    trial = 0
    while len(ports) < CANDIDATES:
        digest = hashlib.sha256(f"{job}/{trial}".encode()).digest()
        ports[FIRST_PORT + int.from_bytes(digest[:8], "big") % (END_PORT - FIRST_PORT)] = None
        trial += 1
    return tuple(ports)
