"""The service that a world's ranks report to, as an object that any loop drives.

Contract: the hub registers its sockets with the selector that it is given; `key.data` is then a `HubKey`. The loop
calls `ready(key)` for those, `tick()` at the latest when `deadline()` (on `clock`) has passed, `worker_ended` for each
worker whose end the driver learns of, and after any of them `take()`, which gives what happened. No call blocks.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from allstep.channel.causes import Case
from allstep.channel.ending import WorkerEnd
from allstep.channel.messages import Beat
from allstep.channel.watchdog import Limits


@dataclass(frozen=True, slots=True)
class HubKey:
    """What a selector's key stands for: a socket of the hub or relay `owner`."""

    owner: object
    connection: object | None = None


@dataclass(frozen=True, slots=True)
class AllArrived:
    """All ranks are there and fit; they were told to go on."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The ranks were turned away, each with this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The run has failed, and it is clear how. The driver orders the ranks to leave."""

    case: Case


@dataclass(frozen=True, slots=True)
class StragglerSeen:
    """A rank takes `ratio` times the others' time for its own part of a step."""

    rank: int
    ratio: float


@dataclass(frozen=True, slots=True)
class AllEnded:
    """The end of every worker is known. A verdict, if there is one, came before."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """At a relay: the head ordered the ranks to leave, and they were told; the driver kills those that do not."""

    reason: str
    code: int


@dataclass(frozen=True, slots=True)
class Finished:
    """At a relay: the attempt is over. `text` is the report (empty after a success), `code` the run's status."""

    text: str
    code: int


HubEvent = AllArrived | Refusal | Verdict | StragglerSeen | AllEnded | Ordered | Finished


class Hub:
    """The service of a whole world."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listener: socket.socket,
        *,
        nonce: str,
        attempt: int,
        world_size: int,
        limits: Limits,
        supervised: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to serve.

        Args:
            selector: the driver's.
            listener: a listening socket, the hub's from now on.
            nonce: what every rank has to know.
            attempt: the present start's number.
            world_size: how many ranks there are.
            limits: how long sections may last.
            supervised: the driver will call `worker_ended` for every rank, so that a closed connection is not yet
                an end; false where a closed connection is the only news there will be.
            clock: seconds, never turned back.
        """
        raise NotImplementedError

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""
        raise NotImplementedError

    def deadline(self) -> float | None:
        """When `tick` is due, on the clock; None where nothing is."""
        raise NotImplementedError

    def tick(self) -> None:
        """Act on the time that has passed."""
        raise NotImplementedError

    def worker_ended(self, end: WorkerEnd) -> None:
        """Take note of how a worker ended."""
        raise NotImplementedError

    def take(self) -> list[HubEvent]:
        """What happened since the last call, in order."""
        raise NotImplementedError

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order all ranks to leave, but for those that are on their way out with an exception of their own.

        Args:
            reason: for the process that leaves.
            code: its exit status.
            printer: the rank that writes the report; None: nobody does.
            report: the text.
        """
        raise NotImplementedError

    def finish(self, text: str, code: int) -> None:
        """Tell every relay that the attempt is over."""
        raise NotImplementedError

    def progress(self) -> tuple[int, int]:
        """The furthest (epoch, iteration) that any rank reached."""
        raise NotImplementedError

    def status(self, rank: int) -> Beat | None:
        """The last heartbeat of a rank."""
        raise NotImplementedError

    def ends(self) -> Mapping[int, WorkerEnd]:
        """How workers ended, by rank."""
        raise NotImplementedError

    def case(self) -> Case | None:
        """The case as it stands now: the cause of the verdict, and what has become of the others since."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of all sockets."""
        raise NotImplementedError
