"""The coordinator of a rank that has nobody to agree with: a null object, at no cost.

Contract: a world of one uses it, and so does an engine that is deliberately not collective, such as an evaluator run
on the main rank only: `Engine(step, coordinator=Alone())`. Every request holds at once.
"""

from __future__ import annotations

from allstep.coordination.coordinator import Request


class Alone:
    """Agreement among one."""

    rank: int = 0
    world_size: int = 1

    def ask(self, request: Request) -> bool:
        """A request of the only rank holds at once."""
        return True
