"""The coordinator of a rank that has nobody to agree with: a null object, at no cost.

Contract: a world of one uses it, and so does an engine that is deliberately not collective, such as an evaluator run
on the main rank only: `Engine(step, coordinator=Alone())`. What the only rank says is what all say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allstep.coordination.coordinator import ReduceOp


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
