"""Schedule: what a step is, which rates groups get, and that ranks and resumed runs have the same."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, ReduceLROnPlateau, StepLR

from allstep import Alone, Engine, Events, Schedule
from allstep.errors import ArgumentError
from allstep.testing import SimulatedRank, run_ranks, simulate
from tests.handlers.resuming import Job, check_resumes_exactly, trained


def optimizer_of(*rates: float, names: bool = False) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": rate, **({"name": f"group {at}"} if names else {})}
        for at, rate in enumerate(rates)
    ]
    return torch.optim.SGD(groups)


def engine_for(optimizer: torch.optim.Optimizer, **options: Any) -> Engine:
    def step(engine: Engine, batch: Any) -> None:
        if engine.state.group_end:
            optimizer.step()

    return Engine(step, **({"coordinator": Alone()} | options))


def rates_seen(schedule: Schedule, engine: Engine, event: Any = None, **run: Any) -> list[float]:
    """The first group's rate after each iteration."""
    seen: list[float] = []
    schedule.attach(engine, event)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(schedule.rates[0]))
    engine.run(**({"data": range(4), "max_epochs": 2} | run))
    return seen


def half(steps: int) -> float:
    return 0.5**steps


def test_a_function_of_steps_multiplies_the_rates() -> None:
    optimizer = optimizer_of(8.0)
    assert rates_seen(Schedule(half, optimizer), engine_for(optimizer), max_epochs=1) == [4.0, 2.0, 1.0, 0.5]


def test_any_scheduler_of_torch_steps_at_the_event_that_is_chosen() -> None:
    optimizer = optimizer_of(8.0)
    schedule = Schedule(StepLR(optimizer, 1, gamma=0.5))
    seen = rates_seen(schedule, engine_for(optimizer), Events.EPOCH_COMPLETED)
    assert seen == [8.0] * 4 + [4.0] * 4
    assert schedule.rates == [2.0]


def test_a_filtered_event_ends_a_schedule_where_another_begins() -> None:
    optimizer = optimizer_of(8.0)
    seen = rates_seen(Schedule(half, optimizer), engine_for(optimizer), Events.ITERATION_COMPLETED(before=3))
    assert seen == [4.0] + [2.0] * 7


def test_accumulation_takes_a_step_for_each_group() -> None:
    optimizer = optimizer_of(8.0)
    seen = rates_seen(Schedule(half, optimizer), engine_for(optimizer, accumulate=3), max_epochs=1)
    assert seen == [8.0, 8.0, 4.0, 2.0]


@pytest.mark.parametrize("make", [lambda o: StepLR(o, 1, gamma=0.5), lambda o: half], ids=["torch", "function"])
def test_warm_up_rises_evenly_and_the_schedule_begins_behind_it(make: Any) -> None:
    optimizer = optimizer_of(8.0)
    schedule = Schedule(make(optimizer), optimizer, warm_up=3)
    assert schedule.rates == [2.0]
    assert rates_seen(schedule, engine_for(optimizer), max_epochs=1) == [4.0, 6.0, 8.0, 4.0]


@pytest.mark.parametrize("key", [1, "group 1"])
def test_groups_that_are_not_named_keep_their_rates(key: int | str) -> None:
    optimizer = optimizer_of(8.0, 4.0, names=True)
    schedule = Schedule({key: half}, optimizer)
    rates_seen(schedule, engine_for(optimizer), max_epochs=1)
    assert schedule.rates == [8.0, 0.25]


def test_each_group_may_have_its_own_function() -> None:
    optimizer = optimizer_of(8.0, 4.0)
    schedule = Schedule([half, lambda steps: 1.0 + steps], optimizer)
    rates_seen(schedule, engine_for(optimizer), max_epochs=1)
    assert schedule.rates == [0.5, 20.0]


def test_a_plateau_of_an_evaluators_metric_lowers_the_rate() -> None:
    optimizer = optimizer_of(8.0)
    trainer = engine_for(optimizer)
    evaluator = Engine(lambda engine, batch: None, coordinator=Alone(), name="evaluator")
    evaluator.add_event_handler(Events.COMPLETED, lambda e: e.state.metrics.update(loss=torch.tensor(1.0)))
    schedule = Schedule(ReduceLROnPlateau(optimizer, factor=0.5, patience=0), metric="loss")
    schedule.attach(evaluator, trainer=trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    trainer.run([0], max_epochs=3)
    assert schedule.rates == [2.0]
    assert list(trainer.extension.states.values()) == [schedule]


def test_a_plateau_may_follow_a_function_of_the_trainer() -> None:
    optimizer = optimizer_of(8.0)
    trainer = engine_for(optimizer)
    schedule = Schedule(ReduceLROnPlateau(optimizer, factor=0.5, patience=0), metric=lambda e: e.state.epoch)
    schedule.attach(trainer)
    trainer.run([0], max_epochs=3)
    assert schedule.rates == [2.0]


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    optimizer = optimizer_of(8.0)
    trainer = engine_for(optimizer, name="the trainer")
    Schedule(ReduceLROnPlateau(optimizer), metric="acuracy").attach(trainer)
    trainer.state.metrics["accuracy"] = 1.0
    with pytest.raises(ArgumentError, match=r"'acuracy', and state\.metrics of the trainer has accuracy"):
        trainer.run([0])


def test_an_iteration_that_is_done_again_is_no_further_step() -> None:
    optimizer = optimizer_of(8.0)
    engine = engine_for(optimizer, accumulate=3)
    schedule = Schedule(half, optimizer).attach(engine, Events.ITERATION_COMPLETED)
    fails = [True]

    @engine.on(Events.ITERATION_STARTED(once=3))
    def fail() -> None:
        if fails.pop():
            raise RuntimeError("once")

    with pytest.raises(RuntimeError, match="once"):
        engine.run(range(3))
    fails.append(False)
    engine.run(range(3))
    assert schedule.scheduler.last_epoch == 3


def _steps_by_samples(coordinator: SimulatedRank, sizes: list[list[int]], accumulate: int) -> list[int]:
    optimizer = optimizer_of(8.0)
    engine = engine_for(optimizer, coordinator=coordinator, accumulate=accumulate, uneven="longest", name="trainer")
    schedule = Schedule(half, optimizer, batch_size=8).attach(engine)
    seen: list[int] = []
    engine.add_event_handler(Events.OPTIMIZER_STEP_COMPLETED, lambda: seen.append(schedule.scheduler.last_epoch))
    engine.run([torch.zeros(size) for size in sizes[coordinator.rank]])
    return seen


@pytest.mark.parametrize(
    ("sizes", "accumulate", "steps"),
    [
        ([[8, 8, 8]], 1, [1, 2, 3]),
        ([[4, 4], [4, 4]], 1, [1, 2]),
        ([[2, 2, 2, 2], [2, 2, 2, 2]], 2, [1, 2]),
        ([[8, 8], [8, 8]], 1, [2, 4]),  # twice the samples: twice as fast
        ([[3, 3, 3], [3, 2]], 1, [0, 1, 1]),  # 6, 11 and 14 samples
    ],
)
def test_by_samples_a_step_is_so_many_of_all_ranks(sizes: list[list[int]], accumulate: int, steps: list[int]) -> None:
    results = simulate(_steps_by_samples, len(sizes), sizes, accumulate)
    assert results == [steps] * len(sizes)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"schedule": 3}, TypeError, "schedule has 3"),
        ({"schedule": half, "optimizer": None}, ValueError, "optimizer is None"),
        ({"schedule": [half, half]}, ValueError, "2 functions"),
        ({"schedule": {"head": half}}, ValueError, "'head'"),
        ({"warm_up": -1}, ValueError, "warm_up is -1"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"metric": "loss"}, ValueError, "metric is 'loss'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Schedule(**({"schedule": half, "optimizer": optimizer_of(1.0)} | arguments))


def test_a_plateau_needs_its_metric_and_takes_no_warm_up() -> None:
    plateau = ReduceLROnPlateau(optimizer_of(1.0))
    with pytest.raises(ArgumentError, match="metric is None"):
        Schedule(plateau)
    with pytest.raises(ArgumentError, match="LinearLR"):
        Schedule(plateau, metric="loss", warm_up=3)


def test_another_optimizer_than_the_schedulers_is_refused() -> None:
    with pytest.raises(ArgumentError, match="leave it out"):
        Schedule(StepLR(optimizer_of(1.0), 1), optimizer_of(1.0))


def test_samples_are_counted_at_optimizer_steps_only() -> None:
    optimizer = optimizer_of(1.0)
    with pytest.raises(ArgumentError, match="OPTIMIZER_STEP_COMPLETED"):
        Schedule(half, optimizer, batch_size=8).attach(engine_for(optimizer), Events.EPOCH_COMPLETED)


def cosine_with_warm_up(job: Job) -> Mapping[str, Any]:
    cosine = CosineAnnealingLR(job.optimizer, T_max=15)
    return {"schedule": Schedule(cosine, warm_up=4).attach(job.trainer)}


def two_by_events(job: Job) -> Mapping[str, Any]:
    by_step = Schedule(LinearLR(job.optimizer, start_factor=0.5, total_iters=6)).attach(job.trainer)
    by_epoch = Schedule(MultiStepLR(job.optimizer, [1, 2])).attach(job.trainer, Events.EPOCH_COMPLETED)
    return {"by step": by_step, "by epoch": by_epoch}


def by_samples(job: Job) -> Mapping[str, Any]:
    factors = {"3.bias": lambda steps: 0.9**steps, 0: lambda steps: 1 / (1 + steps)}
    return {"schedule": Schedule(factors, job.optimizer, warm_up=2, batch_size=4).attach(job.trainer)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "attach",
    [
        by_samples,
        pytest.param(cosine_with_warm_up, marks=pytest.mark.nightly),
        pytest.param(two_by_events, marks=pytest.mark.nightly),
    ],
)
def test_a_killed_run_goes_on_with_the_same_rates_on_two_ranks(tmp_path: Path, attach: Any) -> None:
    first, second = check_resumes_exactly(tmp_path, attach, accumulate=2 if attach is by_samples else 1, kill_at=9)
    assert first["rates"] == second["rates"]
    assert len({tuple(each) for each in first["rates"].values()}) > 5


@pytest.mark.slow
def test_by_samples_a_run_with_other_ranks_and_batches_ends_at_the_same_rate(tmp_path: Path) -> None:
    (whole,) = run_ranks(trained, 1, str(tmp_path / "one"), by_samples)
    run_ranks(partial(trained, epochs=1), 1, str(tmp_path / "two"), by_samples)
    resumed, _ = run_ranks(partial(trained, batch=12), 2, str(tmp_path / "two"), by_samples)
    assert max(whole["rates"]) == 18
    # 6 iterations of 6 samples were 3 of 12.
    assert min(resumed["rates"]) == 4
    assert resumed["rates"][6] == whole["rates"][12]
    assert resumed["rates"][9] == whole["rates"][18]
