"""The pytest plugin: the fixtures `world_of` and `rehearse`.

Loaded by pytest in every project that has allstep installed.

Contract: loading it imports no torch and starts nothing. The first use of the fixture starts the server that the ranks
of the whole session are forked from. A test fails with the first cause and that rank's traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from allstep.faults import FaultPlan
from allstep.rehearsal.rehearsal_report import RehearsalReport
from allstep.testing import rehearsed
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


@pytest.fixture
def rehearse(tmp_path: Path) -> Callable[..., RehearsalReport]:
    """A script that is interrupted in a test: `rehearse("preemption", "train.py", "--lr", "0.1")`.

    It is `allstep.testing.rehearse` with a folder of the test's own, and raises RehearsalError with the whole report.
    """

    def call(kind: Any, script: Any, *arguments: str, **options: Any) -> RehearsalReport:
        __tracebackhide__ = True
        return rehearsed.rehearse(kind, script, *arguments, **{"runs": tmp_path, **options})

    return call
