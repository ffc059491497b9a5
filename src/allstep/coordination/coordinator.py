"""What the Engine asks of the world.

Contract: the Engine calls no collective itself. Whatever crosses ranks, it asks of its `Coordinator`, from the main
thread and at the same points of the loop on every rank: the n-th call of one rank meets the n-th call of the others.
The Engine takes the current world's coordinator unless it was given one; engines that run inside another's handlers
share it, in order.

The coordinator of a rank that has nobody to agree with: a null object, at no cost.

Contract: a world of one uses it, and so does an engine that is deliberately not collective, such as an evaluator run
on the main rank only: `Engine(step, coordinator=Alone())`. What the only rank says is what all say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol, get_args

import torch

ReduceOp = Literal["sum", "max", "min"]

Outcome = Literal["left", "preempted", "finished", "failed"]
"""What a run's end by request means for the run.

"left": it stands where it is and is to go on another time. "preempted": it has to make room and is to be started again
as soon as that can be. "finished": it has reached its goal, and a run that goes on
from here trains nothing. "failed": what it holds is of no use; it is to go on from what was saved before.
"""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""In the order of their weight: where ranks ask for several, the last of them holds."""


class Request(Enum):
    """A change of the loop's course that a handler, a step or a signal asks for on one rank."""

    TERMINATE = "terminate"
    TERMINATE_EPOCH = "terminate_epoch"
    INTERRUPT = "interrupt"
    REPLACE_DATA = "set_data"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, who made it and why.

    `skip` leaves out COMPLETED, or EPOCH_COMPLETED, after it; `outcome` is what a run's end means.
    """

    request: Request
    rank: int
    reason: str
    skip: bool = False
    outcome: Outcome = "left"


class Pending(Protocol):
    """A vote whose result has not been read yet."""

    def wait(self) -> list[int]:
        """The sum over all ranks; waits until every rank has cast its vote."""


class Coordinator(Protocol):
    """How one engine's ranks agree; implemented by `Alone`, and by `GroupCoordinator` over a process group."""

    @property
    def rank(self) -> int:
        """This process' rank among those that agree."""

    @property
    def world_size(self) -> int:
        """How many ranks agree."""

    def vote(self, vector: Sequence[int]) -> Pending:
        """Begin to sum a vector of 64-bit integers, of the same length everywhere, over all ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. The value is pickled."""

    def gather_bytes(self, buffer: torch.Tensor) -> torch.Tensor:
        """Every rank's bytes: uint8 (n,), n the same everywhere, to uint8 (world_size, n) on the buffer's device."""

    def reduce_tensor(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """A tensor of the same shape and type everywhere, reduced element by element, on its device."""

    def broadcast(self, value: Any, source: int) -> Any:
        """The value of rank `source`, on every rank. It is pickled."""


@dataclass(frozen=True, slots=True)
class _Known:
    vector: list[int]

    def wait(self) -> list[int]:
        return self.vector


class Alone:
    """Agreement among one."""

    rank: int = 0
    world_size: int = 1

    def vote(self, vector: Sequence[int]) -> _Known:
        """The only vote is the result."""
        return _Known(list(vector))

    def gather(self, value: Any) -> list[Any]:
        """The only value."""
        return [value]

    def gather_bytes(self, buffer: torch.Tensor) -> torch.Tensor:
        """The only bytes, as one row."""
        return buffer[None]

    def reduce_tensor(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def broadcast(self, value: Any, source: int) -> Any:
        """The value itself."""
        return value
