"""Heartbeats of all ranks become a few numbers, and looks at them a rate."""

from __future__ import annotations

from typing import Any

import pytest

from allstep.protocol.messages import Heartbeat
from allstep.run_record.progress import WINDOW_S, IterationRate, look


def beat(rank: int, iteration: int, **other: Any) -> Heartbeat:
    given = {"epoch": 1, "section": "step", "seconds": 0.0, "engine": "Trainer", **other}
    return Heartbeat(rank=rank, attempt=0, number=1, iteration=iteration, **given)


def test_the_furthest_rank_counts_and_the_distance_to_the_last() -> None:
    seen = look([beat(1, 20, goal=50), beat(0, 21, goal=50), beat(2, 17, goal=50)])
    assert seen is not None
    assert (seen.iteration, seen.behind, seen.goal, seen.ranks) == (21, 4, 50, 3)


def test_iterations_of_another_engine_do_not_compare() -> None:
    seen = look([beat(0, 3, engine="Finetuner"), beat(1, 900)])
    assert seen is not None
    assert (seen.engine, seen.iteration, seen.behind, seen.ranks) == ("Finetuner", 3, 0, 2)


def test_without_heartbeats_there_is_no_progress() -> None:
    assert look([]) is None


def test_the_rate_is_that_of_the_last_minute() -> None:
    pace = IterationRate()
    rates = [pace.note(float(second), 1 + 10 * min(second, 100)) for second in range(200)]
    assert rates[1] is None
    assert rates[50] == pytest.approx(10.0)
    assert rates[100 + int(WINDOW_S) // 2] == pytest.approx(5.0, rel=0.05)
    assert rates[-1] == 0.0


def test_a_run_that_begins_anew_begins_its_rate_anew() -> None:
    pace = IterationRate()
    for second in range(30):
        pace.note(float(second), 1000 + second)
    assert pace.note(30.0, 5) is None
    assert pace.note(40.0, 25) == pytest.approx(2.0)


def test_before_the_first_iteration_there_is_no_rate() -> None:
    pace = IterationRate()
    assert [pace.note(float(second), 0) for second in range(20)] == [None] * 20
