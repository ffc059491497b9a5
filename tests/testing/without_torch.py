"""A function for ranks in a module that loads no torch."""

from typing import Any


def rank_of(world: Any) -> int:
    return int(world.rank)
