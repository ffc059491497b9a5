"""How the supervisors of several machines come together before an attempt: what they say, and who is welcome. Pure.

Contract: node 0's supervisor, the head, listens on the rendezvous port for the whole run. Every other node connects
before each attempt and says `Join`; the head answers `Waiting` every few seconds, and, when all nodes are there,
`Start`, with what the node needs to start its workers, or `Over` when there will be no further attempt. Who cannot take
part gets `Refused`; a node that will not come again says `Resigned`. They are written as the control channel's messages
are. `Roster` decides who is welcome: a wrong token is a stranger's run, which is turned away alone; two nodes of one
rank, or settings that differ, end the run for all.

What a machine says of itself to the others of its run: a pure function but for host name and pid.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from allstep.launch.machine import Launch
from allstep.protocol.codec import Codec
from allstep.protocol.messages import Refused
from allstep.version import __version__

VERSION = 2


@dataclass(frozen=True, slots=True)
class Join:
    """A node's introduction. `facts` are the settings that have to be the same on all nodes, as text."""

    run: str
    token: str
    nodes: int
    node_rank: int
    workers: int
    host: str
    pid: int
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def process(self) -> str:
        """Which process it is, for comparing and for errors."""
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class Waiting:
    """The head is there and waits for other nodes."""


@dataclass(frozen=True, slots=True)
class Start:
    """An attempt begins: its names, where its services are (on the head's host), and which ranks are this node's."""

    run_id: str
    attempt: int
    nonce: str
    channel_port: int
    master_port: int
    first_rank: int
    world_size: int
    max_restarts: int


@dataclass(frozen=True, slots=True)
class Over:
    """The run has ended with this exit status; `text` is one line for this node's terminal."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class Resigned:
    """A node of the run will not come again, for this reason."""

    token: str
    node_rank: int
    reason: str


Message = Join | Waiting | Start | Over | Refused | Resigned

CODEC = Codec("joining", VERSION, typing.get_args(Message))
"""How they are written."""


def token(run: str, secret: str) -> str:
    """Return what nodes of one run show each other, from the run's name and a secret that may be empty."""
    return hmac.new(secret.encode(), f"allstep join {run}".encode(), hashlib.sha256).hexdigest()


class Roster:
    """The nodes that have come for the next attempt, the head's own included."""

    def __init__(self, own: Join) -> None:
        self.own = own
        self.joined: dict[int, Join] = {own.node_rank: own}

    def is_stranger(self, join: Join | Resigned) -> bool:
        """Whether it belongs to another run."""
        return not hmac.compare_digest(join.token.encode(), self.own.token.encode())

    def turned_away(self, join: Join) -> str:
        """Why a stranger cannot join, in words for it."""
        return (
            f"the port is that of run {self.own.run!r} ({self.own.process}), and this is run {join.run!r} or has "
            "another ALLSTEP_SECRET; give each run a port of its own, and all its nodes the same --name and secret"
        )

    def objection(self, join: Join) -> str:
        """Why the run cannot go on with this node; empty where it can."""
        if join.nodes != self.own.nodes:
            return (
                f"node {join.node_rank} ({join.process}) was started with --nnodes {join.nodes}, "
                f"node 0 ({self.own.process}) with --nnodes {self.own.nodes}; give all the same"
            )
        if not 0 <= join.node_rank < self.own.nodes:
            return f"{join.process} says node rank {join.node_rank}, but there are {self.own.nodes} nodes"
        if join.workers < 1:
            return f"node {join.node_rank} ({join.process}) says that it has {join.workers} workers"
        there = self.joined.get(join.node_rank)
        if there is not None and there.process != join.process:
            return (
                f"two supervisors are node {join.node_rank}: {there.process} and {join.process}; "
                "give each machine its own --node-rank"
            )
        for key in sorted(self.own.facts.keys() | join.facts.keys()):
            ours, theirs = self.own.facts.get(key, "not set"), join.facts.get(key, "not set")
            if ours != theirs:
                return (
                    f"nodes disagree about {key}: {ours} on node 0 ({self.own.host}), {theirs} on node "
                    f"{join.node_rank} ({join.host}); start all nodes with the same"
                )
        return ""

    def missing(self) -> tuple[int, ...]:
        """The node ranks that have not come."""
        return tuple(rank for rank in range(self.own.nodes) if rank not in self.joined)

    def first_ranks(self) -> Mapping[int, int]:
        """Each node's first rank, once all have come: in the order of node ranks, however many workers each has."""
        firsts: dict[int, int] = {}
        total = 0
        for node in range(self.own.nodes):
            firsts[node] = total
            total += self.joined[node].workers
        return firsts

    def world_size(self) -> int:
        """The workers of all nodes together."""
        return sum(join.workers for join in self.joined.values())


def introduce(launch: Launch) -> Join:
    """Return this machine's introduction; its run is known by name, or by its SLURM step, or by its script's name."""
    assert launch.nodes is not None
    run = launch.settings.name or launch.nodes.job or os.path.basename(launch.command.target)
    return Join(
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
