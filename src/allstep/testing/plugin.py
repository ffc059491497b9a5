"""The pytest plugin: the fixture `world_of`. Loaded by pytest in every project that has allstep installed.

Contract: loading it imports no torch and starts nothing. The first use of the fixture starts the server that the ranks
of the whole session are forked from. A test fails with the first cause and that rank's traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest

from allstep.faults import FaultPlan
from allstep.testing.ranks import run_ranks


class WorldOf(Protocol):
    """What the fixture `world_of` gives: how many ranks, then what they call."""

    def __call__(
        self,
        world_size: int,
        *,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        fault: FaultPlan | None = None,
        device: str | None = None,
    ) -> Callable[..., list[Any]]:
        """A function that calls `fn(world, *args)` on each rank; see `allstep.testing.run_ranks` for the options."""


@pytest.fixture(scope="session")
def world_of() -> WorldOf:
    """Real ranks in a test: `results = world_of(2)(fn, *args)` calls `fn(world, *args)` on two and gives their results.

    Raises `allstep.testing.RanksError` with the traceback of the rank that failed first.
    """

    def choose(world_size: int, **options: Any) -> Callable[..., list[Any]]:
        def call(fn: Callable[..., Any], *args: Any) -> list[Any]:
            __tracebackhide__ = True
            return run_ranks(fn, world_size, *args, **options)

        return call

    return choose
