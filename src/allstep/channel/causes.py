"""Which end is the cause of the others: pure functions.

Contract: the hub keeps one `Record` per rank, with what became known of it and in which order that came. `judge` makes
a `Case` of the records: the first cause, and an account of every other rank. `due` says when there is enough to judge.
No wall clock takes part: order is the order of arrival at the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from allstep.channel.arrival import Arrival


class Kind(StrEnum):
    """What became of a rank. Those down to EARLY can be causes by themselves."""

    SIGNAL = "signal"
    ERROR = "error"
    EXIT = "exit"
    LOST = "lost"
    NODE_LOST = "node lost"
    SERVICE_LOST = "service lost"
    EARLY = "left early"
    HANG = "hang"
    DERIVED = "derived"
    ORDERED = "left on order"
    KILLED = "killed"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Account:
    """What is known of one rank's part. `what` is a sentence, `status` the exit status that it stands for."""

    rank: int
    kind: Kind
    what: str
    status: int
    order: int = 0
    arrival: Arrival | None = None
    device: str = ""
    epoch: int = 0
    iteration: int = 0
    section: str = ""
    waiting: str = ""
    traceback: str = ""
    output: str = ""
    note: str = ""
    stacks: str = ""
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """The first cause, the further causes and all other ranks, in causal order; and what ranks were slow."""

    cause: Account
    others: tuple[Account, ...]
    world_size: int
    attempt: int
    explanation: str = ""
    slow: tuple[tuple[int, float], ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """The status that the run ends with."""
        return self.cause.status


def judge(records: Sequence[object]) -> Case:
    """Choose the cause."""
    raise NotImplementedError
