"""What an engine asks of the other ranks: the `Coordinator` protocol, and its implementation for one rank alone.

Contract: an engine calls no collective itself. Whatever crosses ranks, it asks of its `Coordinator`, from the main
thread and at the same points of the loop on every rank: the n-th call of one rank meets the n-th call of the others.
An engine takes the current world's coordinator unless it was given one. Engines that run inside another's handlers
share it, in order.

A world of one uses `Alone`. So does an engine that is deliberately not collective, such as an evaluator that runs on
the main rank only: `Engine(step, coordinator=Alone())`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol, get_args

import torch

from allstep.placement import DataRanks

ReduceOp = Literal["sum", "max", "min"]

Outcome = Literal["left", "cancelled", "preempted", "finished", "failed"]
"""What a run's end by request means for the run.

"left": it stops where it stands and goes on another time. "cancelled": a person pressed Ctrl-C, and the process is to
end; started again it goes on. "preempted": the scheduler wants the devices, and it is to be
started again as soon as it can be. "finished": it has reached its goal, and a run that goes on from its state trains
nothing. "failed": its present state is of no use, and it is to go on from what was saved before.
"""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""In the order of precedence: where ranks ask for several, the last of them holds."""


class RequestKind(Enum):
    """What a handler, a step or a signal may ask of a run on one rank."""

    TERMINATE = "terminate"
    TERMINATE_EPOCH = "terminate_epoch"
    INTERRUPT = "interrupt"
    REPLACE_DATA = "set_data"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of a run, by which rank and why.

    `skip` leaves out COMPLETED, or EPOCH_COMPLETED, after it; `outcome` is what a run's end means.
    """

    kind: RequestKind
    rank: int
    reason: str
    skip: bool = False
    outcome: Outcome = "left"


class PendingSum(Protocol):
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

    @property
    def data(self) -> DataRanks:
        """Which of them are given the same batches, and this rank's place among those that are given different ones."""

    def vote(self, vector: Sequence[int]) -> PendingSum:
        """Begin to sum a vector of 64-bit integers, of the same length everywhere, over all ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. The value is pickled."""

    def gather_bytes(self, buffer: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Every rank's bytes: uint8 (n,), n the same everywhere, to uint8 (world_size, n) on the buffer's device.

        Args:
            buffer: this rank's. It may be written to again when this returns.
            rows: contiguous memory for the result, which is made anew without it.
        """

    def reduce_tensor(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """A tensor of the same shape and type everywhere, reduced element by element, on its device."""

    def broadcast(self, value: Any, source: int) -> Any:
        """The value of rank `source`, on every rank. It is pickled."""


@dataclass(frozen=True, slots=True)
class KnownSum:
    """A vote whose result is known already."""

    vector: list[int]

    def wait(self) -> list[int]:
        """The result."""
        return self.vector


class Alone:
    """Agreement among one."""

    rank: int = 0
    world_size: int = 1
    data: DataRanks = DataRanks()

    def vote(self, vector: Sequence[int]) -> KnownSum:
        """The only vote is the result."""
        return KnownSum(list(vector))

    def gather(self, value: Any) -> list[Any]:
        """The only value."""
        return [value]

    def gather_bytes(self, buffer: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The only bytes, as one row."""
        return buffer[None].clone() if rows is None else rows.copy_(buffer)

    def reduce_tensor(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def broadcast(self, value: Any, source: int) -> Any:
        """The value itself."""
        return value
