"""Who may join a run of several machines, and how a machine introduces itself. Pure, but for its host name and pid.

Node 0's supervisor, the head, listens on the rendezvous port for the whole run (`join_server`). Every other machine
connects before each attempt and sends a `JoinRequest` (`follower`); `allstep.protocol.messages` has what the two say to
each other. `JoinedNodes` decides who may join. A wrong token means another run, whose machine is turned away alone. Two
machines of one rank, or settings that differ, end the run for all.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
from collections.abc import Mapping

from allstep.launch.machine import Launch
from allstep.protocol.messages import JoinRequest, NodeResigned
from allstep.version import __version__


def token(run: str, secret: str) -> str:
    """Return what nodes of one run show each other, from the run's name and a secret that may be empty."""
    return hmac.new(secret.encode(), f"allstep join {run}".encode(), hashlib.sha256).hexdigest()


class JoinedNodes:
    """The machines that have come for the next attempt, the head included: their `requests` by node rank."""

    def __init__(self, own: JoinRequest) -> None:
        self.own = own
        self.requests: dict[int, JoinRequest] = {own.node_rank: own}

    def is_stranger(self, request: JoinRequest | NodeResigned) -> bool:
        """Whether it belongs to another run."""
        # In a time that does not depend on the token, which keeps the run's secret from being guessed bit by bit.
        return not hmac.compare_digest(request.token.encode(), self.own.token.encode())

    def turned_away(self, request: JoinRequest) -> str:
        """Why a stranger cannot join, in words for it."""
        return (
            f"the port is that of run {self.own.run!r} ({self.own.process}), and this is run {request.run!r} or has "
            "another ALLSTEP_SECRET; give each run a port of its own, and all its nodes the same --name and secret"
        )

    def objection(self, request: JoinRequest) -> str:
        """Why the run cannot go on with this node; empty where it can."""
        if request.nodes != self.own.nodes:
            return (
                f"node {request.node_rank} ({request.process}) was started with --nnodes {request.nodes}, "
                f"node 0 ({self.own.process}) with --nnodes {self.own.nodes}; give all the same"
            )
        if not 0 <= request.node_rank < self.own.nodes:
            return f"{request.process} says node rank {request.node_rank}, but there are {self.own.nodes} nodes"
        if request.workers < 1:
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
        return tuple(rank for rank in range(self.own.nodes) if rank not in self.requests)

    def first_ranks(self) -> Mapping[int, int]:
        """Each node's first rank, once all have come: in the order of node ranks, however many workers each has."""
        firsts: dict[int, int] = {}
        total = 0
        for node in range(self.own.nodes):
            firsts[node] = total
            total += self.requests[node].workers
        return firsts

    def world_size(self) -> int:
        """The workers of all nodes together."""
        return sum(request.workers for request in self.requests.values())


def introduce(launch: Launch) -> JoinRequest:
    """Return this machine's introduction; its run is known by name, or by its SLURM step, or by its script's name."""
    assert launch.nodes is not None
    # Two runs that meet at one port by mistake must not join: they seldom have the same name or job.
    run = launch.settings.name or launch.nodes.job or os.path.basename(launch.command.target)
    return JoinRequest(
        run=run,
        token=token(run, launch.environ.get("ALLSTEP_SECRET", "")),
        nodes=launch.nodes.count,
        node_rank=launch.nodes.rank,
        workers=launch.workers,
        host=socket.gethostname(),
        pid=os.getpid(),
        facts=_facts(launch),
    )


def _facts(launch: Launch) -> dict[str, str]:
    """The settings that have to be the same on all machines."""
    settings = launch.settings
    return {
        "the version of allstep": __version__,
        "the script": launch.command.target,
        "the script's arguments": repr(list(launch.command.arguments)),
        "name": str(settings.name),
        "max_restarts": str(settings.max_restarts),
        "stop_after": str(settings.stop_after),
        "limits": str(settings.limits),
        "fault": str(settings.fault),
    }
