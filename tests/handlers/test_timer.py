"""Timer and TimeProfiler: what is measured, over ranks, and that nothing is where nothing was asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from allstep import Alone, Checkpoint, Engine, Events
from allstep.engine.registry import HandlerSlot
from allstep.handlers import TimeProfiler, Timer
from allstep.testing import SimulatedRank, run_ranks, simulate
from allstep.world import World
from tests.engine.recording import nothing


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passing(self, seconds: float) -> Any:
        def wait(*arguments: object) -> None:
            self.now += seconds

        return wait


def test_a_timer_adds_up_from_one_event_to_another() -> None:
    clock = Clock()
    trainer = Engine(clock.passing(2.0), coordinator=Alone())
    timer = Timer(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED(every=1), clock=clock).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, clock.passing(5.0))
    trainer.run([0] * 3)
    assert (timer.total, timer.count, timer.last, timer.mean) == (6.0, 3, 2.0, 2.0)


def test_a_pause_is_left_out() -> None:
    clock = Clock()
    timer = Timer(clock=clock)
    timer.start()
    clock.now = 3
    timer.pause()
    clock.now = 10
    timer.resume()
    clock.now = 11
    timer.stop()
    timer.stop()
    assert (timer.total, timer.count) == (4.0, 1)


def test_a_timer_that_has_measured_nothing_has_no_mean() -> None:
    assert Timer().mean is None


def _mean_over_ranks(coordinator: SimulatedRank) -> dict[str, float]:
    clock = Clock()
    trainer = Engine(clock.passing(1.0 + coordinator.rank), coordinator=coordinator, name="trainer")
    Timer(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, name="step, s", clock=clock).attach(trainer)
    return trainer.run([0] * 4, max_epochs=2).metrics


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_named_timer_has_the_mean_over_the_ranks(ranks: int) -> None:
    mean = sum(range(1, ranks + 1)) / ranks
    assert simulate(_mean_over_ranks, ranks) == [{"step, s": mean}] * ranks


def _timed(world: World, folder: str, stop_at: int) -> tuple[float, int]:
    clock = Clock()
    trainer = Engine(clock.passing(1.0 + world.rank))
    timer = Timer(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, name="step", clock=clock).attach(trainer)
    Checkpoint(folder, {"trainer": trainer, "timer": timer}).attach(trainer).resume()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), lambda: trainer.terminate())
    trainer.run([0] * 4, max_epochs=2, window=1)
    return timer.total, timer.count


@pytest.mark.slow
@pytest.mark.nightly
def test_a_resumed_timer_goes_on_on_each_rank(tmp_path: Path) -> None:
    run_ranks(_timed, 2, str(tmp_path), 4)
    assert run_ranks(_timed, 2, str(tmp_path), 99) == [(8.0, 8), (16.0, 8)]


# Where the time of iterations goes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def profiled(clock: Clock, iterations: range | None = None) -> TimeProfiler:
    def batches() -> Any:
        for _ in range(4):
            clock.now += 3
            yield 0

    class Data:
        def __iter__(self) -> Any:
            return batches()

        def __len__(self) -> int:
            return 4

    trainer = Engine(clock.passing(10.0), coordinator=Alone())
    trainer.add_event_handler(Events.ITERATION_STARTED, clock.passing(0.5))
    profiler = TimeProfiler(iterations).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), clock.passing(2.0))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, clock.passing(100.0))
    trainer.run(Data(), max_epochs=2)
    return profiler


def test_the_parts_of_all_iterations_add_up(clock: Clock) -> None:
    profiler = profiled(clock)
    assert {name: each for name, each in profiler.seconds.items() if each} == {
        "data": 24.0,
        "step": 80.0,
        "handlers of ITERATION_STARTED": 4.0,
        "handlers of ITERATION_COMPLETED": 8.0,
        "handlers of EPOCH_COMPLETED": 200.0,
    }
    assert profiler.iterations_done == 8
    assert sum(profiler.seconds.values()) == clock.now


def test_of_chosen_iterations_only_these_are_measured(clock: Clock) -> None:
    profiler = profiled(clock, range(2, 4))
    assert {name: each for name, each in profiler.seconds.items() if each} == {
        "data": 6.0,
        "step": 20.0,
        "handlers of ITERATION_STARTED": 1.0,
        "handlers of ITERATION_COMPLETED": 2.0,
    }


def test_the_report_has_a_line_for_each_part(clock: Clock) -> None:
    lines = profiled(clock).report().splitlines()
    assert lines[0].split() == ["part", "seconds", "share", "ms/iteration", "mean", "of", "ranks,", "s"]
    assert lines[1].split() == ["data", "24.000", "7.6%", "3000.000", "24.000"]


def test_iterations_without_data_are_measured_too(clock: Clock) -> None:
    trainer = Engine(clock.passing(1.0), coordinator=Alone())
    profiler = TimeProfiler().attach(trainer)
    trainer.run(None, max_epochs=1, epoch_length=3)
    assert (profiler.seconds["step"], profiler.iterations_done) == (3.0, 3)


def test_outside_the_chosen_iterations_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Engine(nothing, coordinator=Alone())
    TimeProfiler(range(10_000, 10_001)).attach(trainer)
    seen: list[Any] = []
    call = HandlerSlot.call
    monkeypatch.setattr(HandlerSlot, "call", lambda self, *rest: (seen.append(self.event), call(self, *rest))[1])
    trainer.run([0] * 50)
    assert seen == [Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED]


def _parts_over_ranks(world: World) -> tuple[dict[str, float], dict[str, float]]:
    trainer = Engine(lambda engine, batch: time.sleep(0.02 * (1 + world.rank)))
    profiler = TimeProfiler().attach(trainer)
    trainer.run([0] * 10)
    return profiler.seconds, profiler.over_ranks


@pytest.mark.slow
def test_over_two_ranks_each_has_its_own_and_the_mean() -> None:
    (fast, mean), (slow, other_mean) = run_ranks(_parts_over_ranks, 2)
    assert mean == other_mean
    assert mean["step"] == pytest.approx((fast["step"] + slow["step"]) / 2, abs=1e-5)
    assert slow["step"] > fast["step"] >= 0.2


@pytest.mark.parametrize("iterations", [range(5), range(1, 9, 2), range(3, 3)])
def test_a_range_that_cannot_be_meant_is_refused(iterations: range) -> None:
    with pytest.raises(ValueError, match="iterations is range"):
        TimeProfiler(iterations)
