"""What the Engine asks of the world.

Contract: the Engine calls no collective itself. Whatever crosses ranks, it asks of its `Coordinator`, from the main
thread, at the same points of the loop on every rank. The Engine takes the current world's coordinator unless it was
given one.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Request(Enum):
    """A change of the loop's course that a handler, a step or a signal asks for on one rank."""

    TERMINATE = "terminate"
    TERMINATE_EPOCH = "terminate_epoch"
    INTERRUPT = "interrupt"


class Coordinator(Protocol):
    """How one engine's ranks agree; implemented by `Alone` for a rank that has nobody to agree with."""

    @property
    def rank(self) -> int:
        """This process' rank among those that agree."""

    @property
    def world_size(self) -> int:
        """How many ranks agree."""

    def ask(self, request: Request) -> bool:
        """Take a request to change the loop's course; True says that it holds at once, on this rank alone."""
