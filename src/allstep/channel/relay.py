"""The service of a node that is not the head: its ranks connect to it, and it speaks for them in one connection.

Contract: driven like `Hub`, with the same methods. What its ranks say goes to the head, collected for a moment; what
the head orders goes to the ranks. Losing the head for longer than `limits.link` is a `Verdict` here.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Sequence

from allstep.channel.ending import WorkerEnd
from allstep.channel.hub import HubEvent
from allstep.channel.limits import Limits


class Relay:
    """The service of one node's ranks."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        upstream: tuple[str, int],
        *,
        nonce: str,
        attempt: int,
        node_rank: int,
        ranks: Sequence[int],
        world_size: int,
        limits: Limits,
        supervised: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        raise NotImplementedError

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        raise NotImplementedError

    def deadline(self) -> float | None:
        """When `tick` is due, on the clock."""
        raise NotImplementedError

    def tick(self) -> None:
        """Act on the time that has passed."""
        raise NotImplementedError

    def worker_ended(self, end: WorkerEnd) -> None:
        """Pass the end of a worker of this node to the head."""
        raise NotImplementedError

    def take(self) -> list[HubEvent]:
        """What happened since the last call, in order."""
        raise NotImplementedError

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order this node's ranks to leave."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of all sockets."""
        raise NotImplementedError
