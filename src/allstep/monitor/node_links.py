"""The relays that are connected to a hub, those that are still expected, and when a link between nodes is lost.

Contract: the hub says which relay came, and that something was heard from one; `check` is called once a second. Each
end says something once a second, so a relay from which nothing came for longer than the limit is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from allstep.protocol.messages import NodeHello
from allstep.protocol.server import Peer

_AWAY_S = 3.0  # of silence, after which a node's ranks are not judged by their heartbeats


class Node:
    """A relay that is connected."""

    def __init__(self, hello: NodeHello, world_size: int, now: float) -> None:
        self.rank = hello.node_rank
        self.host = hello.host
        self.ranks = frozenset(rank for rank in hello.ranks if 0 <= rank < world_size)
        self.heard = now


class Links:
    """The nodes behind a hub.

    Args:
        world_size: ranks of all nodes.
        link: seconds of silence after which a relay is lost.
        clock: seconds, never turned back.
        age: seconds since a time on the clock, as far as they count.
    """

    def __init__(self, world_size: int, link: float, clock: Callable[[], float], age: Callable[[float], float]) -> None:
        self._world_size = world_size
        self._link = link
        self._clock = clock
        self._age = age
        self._nodes: dict[Peer, Node] = {}
        self._expected: dict[int, tuple[Collection[int], float]] = {}

    def __contains__(self, peer: Peer) -> bool:
        return peer in self._nodes

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._nodes))

    def expect(self, node_rank: int, ranks: Collection[int]) -> None:
        """A node with these ranks will connect, within twice the limit."""
        self._expected[node_rank] = ranks, self._clock() + 2 * self._link

    def came(self, peer: Peer, hello: NodeHello) -> None:
        """A relay introduced itself."""
        self._nodes[peer] = Node(hello, self._world_size, self._clock())
        self._expected.pop(hello.node_rank, None)

    def heard(self, peer: Peer) -> Node:
        """Something came from a relay."""
        node = self._nodes[peer]
        node.heard = self._clock()
        return node

    def ranks(self, peer: Peer) -> frozenset[int]:
        """The ranks that a relay speaks for."""
        return self._nodes[peer].ranks

    def lose(self, peer: Peer, why: str) -> tuple[Collection[int], str]:
        """A relay is gone; return its ranks, and what became of them in words."""
        node = self._nodes.pop(peer)
        return node.ranks, f"was lost with node {node.rank} ({node.host}): {why}"

    def silent(self) -> list[tuple[Peer, str]]:
        """The relays that are lost, and why."""
        ages = [(peer, self._age(node.heard)) for peer, node in self._nodes.items()]
        return [(peer, f"nothing was heard from it for {age:.0f} s") for peer, age in ages if age > self._link]

    def absent(self) -> list[tuple[Collection[int], str]]:
        """The ranks of nodes that did not connect in time, each told once, and what became of them in words."""
        late = [node for node, (_, until) in self._expected.items() if self._clock() > until]
        return [
            (self._expected.pop(node)[0], f"was lost with node {node}, which did not connect to this one")
            for node in late
        ]

    def away(self) -> set[int]:
        """The ranks of nodes from which nothing has come for a moment."""
        unheard = [node for node in self._nodes.values() if self._age(node.heard) > _AWAY_S]
        return {rank for node in unheard for rank in node.ranks}
