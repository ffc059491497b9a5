"""TimeLimit, with a clock that the test moves."""

from __future__ import annotations

from datetime import timedelta

import pytest

from allstep import Alone, Engine, Events, TimeLimit
from allstep.testing import SimulatedRank, simulate


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ticking(clock: Clock, coordinator: SimulatedRank | Alone, seconds: float = 1.0) -> Engine:
    def step(engine: Engine, batch: object) -> None:
        clock.now += seconds

    return Engine(step, coordinator=coordinator, name="ticking")


@pytest.mark.parametrize("limit", [5, 5.0, timedelta(seconds=5), timedelta(milliseconds=4001)])
def test_ends_the_run_after_the_iteration_in_which_time_is_up(limit: float | timedelta) -> None:
    clock = Clock()
    engine = ticking(clock, Alone())
    TimeLimit(limit, clock=clock).attach(engine)
    state = engine.run(range(100))
    assert state.iteration == 5
    assert state.stop_reason is not None
    assert state.stop_reason.startswith("rank 0: time limit of ")


def test_the_clock_starts_with_each_run_and_not_before() -> None:
    clock = Clock()
    engine = ticking(clock, Alone())
    TimeLimit(5, clock=clock).attach(engine)
    clock.now += 100
    engine.run(range(4))
    assert engine.state.stop_reason is None
    engine.run(range(3))
    assert (engine.state.iteration, engine.state.stop_reason) == (3, None)


def test_time_spent_in_handlers_at_an_epochs_end_counts() -> None:
    clock = Clock()
    engine = ticking(clock, Alone())

    @engine.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        clock.now += 10

    TimeLimit(7, clock=clock).attach(engine)
    state = engine.run(range(3), max_epochs=5)
    assert (state.epoch, state.iteration) == (1, 3)


def test_a_suspended_run_goes_on_with_the_time_that_has_passed() -> None:
    clock = Clock()
    engine = ticking(clock, Alone())
    TimeLimit(6, clock=clock).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.interrupt())
    engine.run(range(100))
    assert engine.state.iteration == 2
    clock.now += 3
    assert engine.run().iteration == 3


def _one_rank_runs_out_of_time(coordinator: SimulatedRank, window: int | None) -> tuple[int, str | None]:
    clock = Clock()
    engine = ticking(clock, coordinator, seconds=1.0 if coordinator.rank == 1 else 0.0)
    TimeLimit(10, clock=clock).attach(engine)
    state = engine.run(range(1000), window=window)
    return state.iteration, state.stop_reason


def test_the_first_rank_whose_time_is_up_stops_all_at_the_same_iteration() -> None:
    results = simulate(_one_rank_runs_out_of_time, 3, None)
    assert len(set(results)) == 1
    iteration, reason = results[0]
    assert 10 <= iteration < 100
    assert reason == "rank 1: time limit of 10 s"


def test_with_windows_of_one_all_stop_after_that_very_iteration() -> None:
    assert simulate(_one_rank_runs_out_of_time, 3, 1) == [(10, "rank 1: time limit of 10 s")] * 3


@pytest.mark.parametrize("limit", [0, -1, float("nan"), timedelta(0)])
def test_a_limit_that_is_not_positive_is_refused(limit: float | timedelta) -> None:
    with pytest.raises(ValueError, match="more than 0 seconds"):
        TimeLimit(limit)
