"""What a preflight's two sides say to each other: node 0 orders, and each node's agent answers.

An order goes over the connection on which a machine waits for a run to begin, and from its supervisor to its agent
(`allstep.preflight.agent`) through a pipe. Answers come back the same way: any number of `NodeFinding`, `DeviceSums`
and `LinkMeasured`, and then `StepDone`. `LinkProbe` is what the agents of two nodes send each other to measure what is
between them. All are part of `allstep.protocol.messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STEPS = ("look", "clock", "links", "measure", "reduce", "end")
"""What an agent can be ordered to do; its docstring says what each is."""


@dataclass(frozen=True, slots=True)
class PreflightOrder:
    """Take a step.

    `key` is what agents prove to each other; it does not cross the network, where each supervisor derives it from
    `salt` and the run's key. `first_rank` is this node's. `addresses` and `ports` say by node rank where
    the other agents listen, and in `peers` are those to measure. `store` is the port of the store for a step "reduce".
    """

    number: int
    step: str
    node: int = 0
    nodes: int = 1
    salt: str = ""
    key: str = ""
    first_rank: int = 0
    world_size: int = 1
    store: int = 0
    addresses: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, str] = field(default_factory=dict)
    peers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeFinding:
    """What a host check found; see `allstep.host_checks.HostFinding`."""

    subject: str
    verdict: str
    text: str
    remedy: str


@dataclass(frozen=True, slots=True)
class DeviceSums:
    """What a device computed: the sum of all bits of it, and whether a check on the processor confirms it.

    `problem` is why there is none, or why it took no part in the all-reduce.
    """

    local_rank: int
    device: str
    digest: str = ""
    exact: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """What is between this node and a peer; `problem` is why nothing could be measured.

    `latency` is the median time of a round trip in seconds, `sent` and `received` are bytes a second, `lost` is the
    part of packets that had to be sent again, `mtu` bytes of a packet (0: unknown).
    """

    peer: int
    problem: str = ""
    latency: float = 0.0
    sent: float = 0.0
    received: float = 0.0
    lost: float = 0.0
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step is over; the time of this machine's clock, and the ports of its agent and of its store."""

    number: int
    time: float = 0.0
    port: int = 0
    store: int = 0


@dataclass(frozen=True, slots=True)
class LinkProbe:
    """A text of some length; the other side answers with one of `reply` characters, or not at all where that is -1.

    `lost` is the part of the packets which that side had to send again.
    """

    reply: int
    padding: str = ""
    lost: float = 0.0
