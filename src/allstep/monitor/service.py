"""What monitors the ranks of a node, as those see it that drive it: the hub of the world, or the relay to it.

Contract: the sockets of a `Service` are in the selector that it was given; `key.data` is then a `SocketKey`
whose owner it is. The driver calls `ready(key)` for those, `tick()` at the latest when `deadline()` has passed,
`worker_ended` for each worker whose end it learns of, and then `take()`, which gives what happened. No call blocks.
Only the driver gives orders to leave. Drivers are an attempt of the launcher, a sidecar's process, and a call of
`allstep.testing`.
"""

from __future__ import annotations

import selectors
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.root_cause import Diagnosis
from allstep.protocol.connection import Connection
from allstep.protocol.messages import CheckpointSaved, Finish, Leave
from allstep.protocol.registration import RankRegistration
from allstep.protocol.worker_exit import WorkerExit


@dataclass(frozen=True, slots=True)
class MonitorSettings:
    """What a hub and its relays have to know of the ranks that they watch over.

    Attributes:
        key: what every rank and relay has to have; see `protocol.authentication`.
        attempt: the present start's number.
        world_size: how many ranks the whole world has.
        limits: how long sections, and links between nodes, may be silent.
        supervised: the driver started the ranks of its node, and calls `worker_ended` for every one, so that a closed
            connection is not yet an end. Where it is false the driver calls it if it can, at once, and only a rank's
            connection is sure to tell that it is gone.
        introduced: called with each rank that introduces itself to this very service, and its connection, before it is
            answered: from then on it may end at any time.
        report: called at a relay with a report that the head leaves to this node to write, before its ranks are
            ordered to leave.
        saved: called at the hub with each checkpoint that was committed.
        remark: asked when a rank of this node reports an exception of its own, for what the node knows of the reason.
    """

    key: str
    attempt: int
    world_size: int
    limits: HangLimits = field(default_factory=HangLimits)
    supervised: bool = True
    introduced: Callable[[RankRegistration, Connection], None] | None = None
    report: Callable[[str], None] | None = None
    saved: Callable[[CheckpointSaved], None] | None = None
    remark: Callable[[], str] | None = None


@dataclass(frozen=True, slots=True)
class AllArrived:
    """All ranks are there and fit; they were told to go on."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The run has failed, and `diagnosis` says how. There is at most one; the driver orders the ranks to leave."""

    diagnosis: Diagnosis


@dataclass(frozen=True, slots=True)
class StragglerSeen:
    """A rank takes `ratio` times the others' time for its own part of a step."""

    rank: int
    ratio: float


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """A rank of this very service let go of its connection without a goodbye: most likely its process ends.

    A driver that can see how a process ends calls `worker_ended` in the same turn.
    """

    rank: int


@dataclass(frozen=True, slots=True)
class AllEnded:
    """The end of every worker is known. A verdict, if there is one, came before."""


MonitorEvent = AllArrived | Verdict | StragglerSeen | ConnectionLost | AllEnded | Leave | Finish
"""What `Service.take` gives. `Leave` and `Finish` come at a relay, as the head sent them: the ranks were
ordered to leave, and were told, so that the driver kills those that do not; the attempt is over.
"""


class Service(Protocol):
    """A `Hub` or a `Relay`."""

    def ready(self, key: selectors.SelectorKey) -> None:
        """Act on a socket that the selector found ready."""

    def deadline(self) -> float:
        """When `tick` is due, on the clock."""

    def tick(self) -> None:
        """Act on the time that has passed."""

    def foretell(self, end: WorkerExit) -> None:
        """Tell other nodes how a rank of this one ends, before anything else; `worker_ended` follows.

        Without a supervisor a scheduler may end the driver right behind the last of its ranks. What this says is then
        all that is ever known.
        """

    def worker_ended(self, end: WorkerExit) -> None:
        """Take note of how a worker of this node ended."""

    def take(self) -> list[MonitorEvent]:
        """What happened since the last call, in order."""

    def order_leave(self, reason: str, code: int, *, printer: int | None = None, report: str | None = None) -> None:
        """Order all ranks to leave, but for those that are on their way out with an exception of their own.

        Args:
            reason: for the process that leaves.
            code: its exit status.
            printer: the rank that writes the report; None: none does, and where there is a report, the service of
                another node writes it.
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
    def undecided(self) -> bool:
        """Whether something is known that may still become a verdict."""

    @property
    def writes_report(self) -> bool:
        """Whether the report of a verdict is this driver's to write, and not another node's."""

    def present(self) -> list[int]:
        """The ranks whose World is open, as far as is known."""

    def registrations(self) -> Mapping[int, RankRegistration]:
        """How each rank that came introduced itself."""

    def connection(self, rank: int) -> Connection | None:
        """The connection of a rank that reports to this very service; None where a relay, or nothing, is between."""

    def diagnosis(self) -> Diagnosis | None:
        """What the verdict says, and what has become of the ranks since; None before there is one."""

    def close(self) -> None:
        """Let go of all sockets."""
