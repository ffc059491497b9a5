"""What a `Checkpoint` asks of the World that is open, if any: without one it is alone.

Contract: called from the main thread; `as_rank_0_says` on every rank at the same point.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from allstep.world import World

T = TypeVar("T")


def current_rank() -> int:
    """This process among all."""
    world = World.current()
    return 0 if world is None else world.rank


def current_seed() -> int | None:
    """What the World was seeded with."""
    world = World.current()
    return None if world is None else world.seed


def as_rank_0_says(value: T) -> T:
    """Rank 0's value, on every rank."""
    world = World.current()
    return value if world is None else world.gather_objects(value)[0]


def section() -> AbstractContextManager[None]:
    """For the watchdog: a save may last longer than a handler."""
    world = World.current()
    return nullcontext() if world is None else world.section("checkpoint")
