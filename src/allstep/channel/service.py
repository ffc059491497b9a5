"""What serves a node's ranks, as those that drive it see it: the hub of the world, or the relay to it.

Contract: its sockets are in the selector that it was given; `key.data` is then a `HubKey` whose owner it is. The driver
calls `ready(key)` for those, `tick()` at the latest when `deadline()` has passed, `worker_ended` for each worker whose
end it learns of, and then `take()`, which gives what happened. No call blocks. Orders to leave are the driver's to
give. Drivers are an attempt of the launcher, a sidecar's process, and a round of the pool of warm processes.
"""

from __future__ import annotations

import selectors
from collections.abc import Mapping
from typing import Protocol

from allstep.channel.arrival import Arrival
from allstep.channel.causes import Case
from allstep.channel.ending import WorkerEnd
from allstep.channel.events import HubEvent


class Service(Protocol):
    """A hub or a relay."""

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""

    def deadline(self) -> float:
        """When `tick` is due, on the clock."""

    def tick(self) -> None:
        """Act on the time that has passed."""

    def worker_ended(self, end: WorkerEnd) -> None:
        """Take note of how a worker of this node ended."""

    def take(self) -> list[HubEvent]:
        """What happened since the last call, in order."""

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order all ranks to leave, but for those that are on their way out with an exception of their own.

        Args:
            reason: for the process that leaves.
            code: its exit status.
            printer: the rank that writes the report; None: nobody does.
            report: the text.
        """

    def notify(self, text: str, printer: int) -> None:
        """Have a rank write a line to standard error."""

    def finish(self, text: str, code: int) -> None:
        """Tell every relay that the attempt is over."""

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent; a driver that ends may give them a moment."""

    @property
    def connected(self) -> int:
        """How many ranks and relays are connected."""

    @property
    def settling(self) -> bool:
        """Whether something is known that may still become a verdict."""

    def present(self) -> list[int]:
        """The ranks whose World is open, as far as is known."""

    def arrivals(self) -> Mapping[int, Arrival]:
        """How each rank that came introduced itself."""

    def case(self) -> Case | None:
        """The case as it stands now, once there was a verdict."""

    def close(self) -> None:
        """Let go of all sockets."""
