"""Who may join a run of several machines, and how a machine introduces itself. Pure, but for its host name and pid.

Node 0's supervisor, the head, listens on the rendezvous port for the whole run (`join_server`). Every other machine
connects before each attempt and sends a `JoinRequest` (`follower`); `allstep.protocol.messages` has what the two say to
each other. Before that, both have proved that they have the run's key, which `run_key` makes of the user's secret and
the run's name. A machine of another run does not have it, and is turned away alone, without being told anything.
`JoinedNodes` decides about those that have it: two machines of one rank, or settings that differ, end the run for all.
`objection_to_start` is for the other side: it says what is wrong with what a head wants to begin.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

from allstep.errors import ConfigurationError, LaunchError
from allstep.launch.machine import Launch
from allstep.launch.settings import check_run_name
from allstep.protocol.authentication import derived_key
from allstep.protocol.foreign_text import one_line
from allstep.protocol.masking import masked_arguments, short_sum
from allstep.protocol.messages import AttemptStart, JoinRequest
from allstep.protocol.user_secret import VARIABLE, secret_file, user_secret
from allstep.version import __version__


def run_key(launch: Launch) -> str:
    """What all machines of a run have, and no other run.

    Raises:
        ConfigurationError: the secret is not one.
        LaunchError: there is none, and none can be made.
    """
    assert launch.nodes is not None
    # Two runs that meet at one port by mistake must not join: they seldom have the same name or job.
    run = launch.settings.name or launch.nodes.job or os.path.basename(launch.command.target)
    try:
        return derived_key(user_secret(launch.environ), "join", run)
    except OSError as error:
        raise LaunchError(
            f"the machines of this run have no secret by which to know each other, and none can be kept here "
            f"({error.strerror or error}: {error.filename or 'home'}); set {VARIABLE} to the same on all of them, as "
            "`openssl rand -hex 16` gives one"
        ) from error


def attempt_key(key: str, salt: str) -> str:
    """What the ranks and services of one attempt have."""
    return derived_key(key, "attempt", salt)


def same_key_on_all(launch: Launch) -> str:
    """What to look at where two machines of a run do not have the same key, in words."""
    secret = f"the same {VARIABLE}"
    if VARIABLE not in launch.environ:
        secret = f"the same secret: the file {secret_file(launch.environ)}, or {VARIABLE} where they share no home"
    return f"give each run a port of its own, and all its machines the same --name and {secret}"


class JoinedNodes:
    """The machines that have come for the next attempt, the head included: their `requests` by node rank."""

    def __init__(self, own: JoinRequest) -> None:
        self.own = own
        self.requests: dict[int, JoinRequest] = {own.node_rank: own}
        self.left_out: frozenset[int] = frozenset()

    def objection(self, request: JoinRequest) -> str:
        """Why the run cannot go on with this node; empty where it can."""
        return one_line(self._objection(request))

    def _objection(self, request: JoinRequest) -> str:
        if request.nodes != self.own.nodes:
            return (
                f"node {request.node_rank} ({request.process}) was started with --nnodes {request.nodes}, "
                f"node 0 ({self.own.process}) with --nnodes {self.own.nodes}; give all the same"
            )
        if not 0 <= request.node_rank < self.own.nodes:
            return f"{request.process} says node rank {request.node_rank}, but there are {self.own.nodes} nodes"
        if request.node_rank in self.left_out:
            return f"node {request.node_rank} ({request.process}) is left out of this run"
        if not 1 <= request.workers <= MOST_WORKERS:
            return f"node {request.node_rank} ({request.process}) says that it has {request.workers} workers"
        # The same process may come again over a new connection, when the old one broke.
        there = self.requests.get(request.node_rank)
        if there is not None and there.process != request.process:
            return (
                f"two supervisors are node {request.node_rank}: {there.process} and {request.process}; "
                "give each machine its own --node-rank"
            )
        for key in sorted(self.own.facts.keys() | request.facts.keys()):
            ours, theirs = self.own.facts.get(key, "not set"), request.facts.get(key, "not set")
            if ours != theirs:
                return (
                    f"nodes disagree about {key}: {ours} on node 0 ({self.own.host}), {theirs} on node "
                    f"{request.node_rank} ({request.host}); start all nodes with the same"
                )
        return ""

    def missing(self) -> tuple[int, ...]:
        """The node ranks that have not come."""
        return tuple(rank for rank in self.taking_part() if rank not in self.requests)

    def taking_part(self) -> tuple[int, ...]:
        """The node ranks of the run's machines, without those that are left out: a node's place is its index here."""
        return tuple(rank for rank in range(self.own.nodes) if rank not in self.left_out)

    def leave_out(self, nodes: frozenset[int]) -> None:
        """Go on without some nodes."""
        self.left_out |= nodes
        for node in nodes:
            self.requests.pop(node, None)

    def first_ranks(self) -> Mapping[int, int]:
        """Each node's first rank, once all have come: in the order of node ranks, however many workers each has."""
        firsts: dict[int, int] = {}
        total = 0
        for node in self.taking_part():
            firsts[node] = total
            total += self.requests[node].workers
        return firsts

    def world_size(self) -> int:
        """The workers of all nodes together."""
        return sum(request.workers for request in self.requests.values())


def introduce(launch: Launch) -> JoinRequest:
    """Return this machine's introduction."""
    assert launch.nodes is not None
    return JoinRequest(
        nodes=launch.nodes.count,
        node_rank=launch.nodes.rank,
        workers=launch.workers,
        host=socket.gethostname(),
        pid=os.getpid(),
        facts=_facts(launch),
    )


def objection_to_start(start: AttemptStart, workers: int) -> str:
    """What is wrong with an attempt that the head wants this machine to begin; empty where nothing is.

    Args:
        start: what the head sent. Its name becomes a folder's.
        workers: of this machine.
    """
    try:
        check_run_name("run_id", start.run_id)
    except ConfigurationError as error:
        return one_line(str(error))
    ports = all(0 < port < 65536 for port in (start.channel_port, start.master_port))
    ranks = start.first_rank >= 0 and start.first_rank + workers <= start.world_size
    if not ports or not ranks or start.attempt < 0 or start.max_restarts < 0 or len(start.run_id) > _LONGEST_NAME:
        return one_line(f"an attempt cannot be {start}")
    return ""


MOST_WORKERS = 1 << 14
"""Workers of one machine, at most: the head keeps a record of each, so a number out of nowhere would cost memory."""

_LONGEST_NAME = 200  # characters of a folder's name


def _facts(launch: Launch) -> dict[str, str]:
    """The settings that have to be the same on all machines."""
    settings = launch.settings
    return {
        "the version of allstep": __version__,
        "the script": launch.command.target,
        "the script's arguments": _arguments(launch.command.arguments),
        "name": str(settings.name),
        "max_restarts": str(settings.max_restarts),
        "stop_after": str(settings.stop_after),
        "limits": str(settings.limits),
        "fault": str(settings.fault),
    }


def _arguments(arguments: Sequence[str]) -> str:
    """The arguments for comparing and for errors: secrets among them only as a sum."""
    shown = masked_arguments(arguments)
    hidden = [argument for argument, masked in zip(arguments, shown, strict=True) if argument != masked]
    return repr(shown) + (f" (sum of what is hidden: {short_sum(repr(hidden))})" if hidden else "")
