"""The relays that are connected to a head's hub, and those that are still expected; it has no sockets."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from allstep.monitor.driven_clock import DrivenClock
from allstep.protocol.messages import NodeHello
from allstep.protocol.registration import spans
from allstep.protocol.server import Peer

_UNHEARD_S = 3.0  # of a relay's silence, after which its ranks are not judged by their heartbeats


class NodeLinks:
    """The relays that are connected to a hub, and those that are still expected.

    The hub reports which relay connected, and that something was heard from one. Each end sends something once a
    second, so a relay from which nothing came for longer than the limit is lost.

    Args:
        world_size: ranks of all nodes.
        link: seconds of silence after which a relay is lost.
        clock: the hub's.
    """

    def __init__(self, world_size: int, link: float, clock: DrivenClock) -> None:
        self._world_size = world_size
        self._link = link
        self._clock = clock
        self._hellos: dict[Peer, NodeHello] = {}
        self._heard: dict[Peer, float] = {}
        self._expected: dict[int, tuple[Collection[int] | None, float]] = {}

    def __contains__(self, peer: Peer) -> bool:
        return peer in self._hellos

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._hellos))

    def expect(self, node_rank: int, ranks: Collection[int] | None) -> None:
        """Let a node connect; where its ranks are known, it has to, within twice the limit."""
        self._expected[node_rank] = ranks, self._clock.now() + 2 * self._link

    def reporter(self, present: Collection[int]) -> int:
        """The node that writes the report where the head cannot: the lowest connected one whose ranks are `present`.

        A node whose ranks have all closed their World does not take the end of the head for a failure. -1: none is
        connected.
        """
        nodes = [(set(present).isdisjoint(hello.ranks), hello.node_rank) for hello in self._hellos.values()]
        return min(nodes)[1] if nodes else -1

    def objection(self, hello: NodeHello) -> str:
        """Why a relay is not one that is waited for; empty where it is."""
        node, claimed = hello.node_rank, set(hello.ranks)
        if node not in self._expected:
            return f"node {node} ({hello.host}) is not waited for: it came before, or is none of this run's"
        ranks = self._expected[node][0]
        if ranks is not None and claimed != set(ranks):
            return f"node {node} ({hello.host}) says it has ranks {spans(claimed)}, and it has {spans(ranks)}"
        taken = {rank for each in self._hellos.values() for rank in each.ranks}
        if not claimed or not claimed <= set(range(self._world_size)) or claimed & taken:
            return f"node {node} ({hello.host}) says it has ranks {spans(claimed)}, which it cannot have"
        return ""

    def connected(self, peer: Peer, hello: NodeHello) -> None:
        """A relay introduced itself, to which there is no objection."""
        self._hellos[peer], self._heard[peer] = hello, self._clock.now()
        del self._expected[hello.node_rank]

    def heard(self, peer: Peer) -> Collection[int]:
        """Something came from a relay; return the ranks that it stands for."""
        self._heard[peer] = self._clock.now()
        return self._hellos[peer].ranks

    def node(self, peer: Peer) -> int:
        """The rank of a relay's node."""
        return self._hellos[peer].node_rank

    def ranks(self, peer: Peer) -> Collection[int]:
        """The ranks that a relay stands for."""
        return self._hellos[peer].ranks

    def lose(self, peer: Peer, why: str) -> tuple[Collection[int], str]:
        """A relay is gone; return its ranks, and what became of them in words."""
        hello = self._hellos.pop(peer)
        del self._heard[peer]
        return hello.ranks, f"was lost with node {hello.node_rank} ({hello.host}): {why}"

    def silent(self) -> list[tuple[Peer, str]]:
        """The relays that are lost, and why."""
        ages = [(peer, self._clock.age(heard)) for peer, heard in self._heard.items()]
        return [(peer, f"nothing was heard from it for {age:.0f} s") for peer, age in ages if age > self._link]

    def absent(self) -> list[tuple[Collection[int], str]]:
        """The ranks of nodes that did not connect in time, each told once, and what became of them in words."""
        now = self._clock.now()
        late = {node: ranks for node, (ranks, until) in self._expected.items() if ranks is not None and now > until}
        for node in late:
            del self._expected[node]
        return [
            (ranks, f"was lost with node {node}, which did not connect to this one") for node, ranks in late.items()
        ]

    def unheard(self) -> set[int]:
        """The ranks of nodes from which nothing has come for a moment."""
        quiet = [peer for peer, heard in self._heard.items() if self._clock.age(heard) > _UNHEARD_S]
        return {rank for peer in quiet for rank in self._hellos[peer].ranks}
