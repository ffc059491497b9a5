"""When an evaluator runs in a training run, where its results go, and that ranks agree on the time."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from allstep import Alone, Engine, Evaluate, Events, Mean, Metrics
from allstep.testing import SimulatedRank, run_ranks, simulate
from allstep.world import World
from tests.engine.recording import CountingRank, nothing


def evaluated_at(every: Any, *, iterations: int = 6, epochs: int = 2, attach: Any = None) -> list[int]:
    trainer = Engine(nothing, coordinator=Alone())
    seen: list[int] = []
    evaluator = Engine(nothing, coordinator=Alone())
    evaluator.add_event_handler(Events.COMPLETED, lambda: seen.append(trainer.state.iteration))
    assert isinstance(Evaluate(evaluator, [0, 0], every=every).attach(trainer), Evaluate)
    if attach is not None:
        attach(trainer)
    trainer.run([0] * iterations, max_epochs=epochs)
    return seen


@pytest.mark.parametrize(
    ("every", "at"),
    [
        (4, [4, 8, 12]),
        (5, [5, 10, 12]),  # and at the end
        ("epoch", [6, 12]),
        ("2 epochs", [12]),
        ("4 iterations", [4, 8, 12]),
        ((3, "epoch"), [3, 6, 9, 12]),  # once where both are due
        (100, [12]),
        ("1 hour", [12]),
    ],
)
def test_an_evaluator_runs_after_these_iterations(every: Any, at: list[int]) -> None:
    assert evaluated_at(every) == at


def test_a_run_that_was_broken_off_is_not_evaluated_at_its_end() -> None:
    def leave(trainer: Engine) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: trainer.terminate())

    assert evaluated_at(4, attach=leave) == [4]


def test_results_are_in_the_trainers_under_a_prefix() -> None:
    trainer = Engine(nothing, coordinator=Alone())
    trainer.state.metrics["accuracy"] = 0.5
    evaluator = Engine(lambda engine, batch: batch, coordinator=Alone())
    Metrics({"accuracy": Mean()}).attach(evaluator)
    Evaluate(evaluator, [torch.tensor([1.0]), torch.tensor([3.0])]).attach(trainer)
    trainer.run([0])
    assert {name: float(value) for name, value in trainer.state.metrics.items()} == {"accuracy": 0.5, "val/accuracy": 2}


def test_each_run_evaluates_anew() -> None:
    trainer, evaluator = (Engine(nothing, coordinator=Alone()) for _ in range(2))
    runs: list[int] = []
    evaluator.add_event_handler(Events.COMPLETED, lambda: runs.append(trainer.state.iteration))
    Evaluate(evaluator, [0]).attach(trainer)
    trainer.run([0] * 3)
    trainer.run([0] * 3)
    trainer.run([0] * 3, max_epochs=2)
    assert runs == [3, 3, 6]


def test_alone_the_time_decides() -> None:
    now = [0.0]
    trainer = Engine(lambda engine, batch: now.__setitem__(0, now[0] + 1), coordinator=Alone())
    evaluator = Engine(nothing, coordinator=Alone())
    seen: list[int] = []
    evaluator.add_event_handler(Events.COMPLETED, lambda: seen.append(trainer.state.iteration))
    Evaluate(evaluator, [0], every=timedelta(seconds=10), clock=lambda: now[0]).attach(trainer)
    trainer.run([0] * 35)
    assert seen == [10, 20, 30, 35]


def _by_time(coordinator: SimulatedRank, every: str | None) -> tuple[list[int], int]:
    counting = CountingRank(coordinator)
    # Rank 0's clock goes by a second an iteration, the others' by an hour.
    now = [0.0]
    pace = 3600 if coordinator.rank else 1

    def step(engine: Engine, batch: object) -> None:
        now[0] += pace

    trainer = Engine(step, coordinator=counting, name="trainer")  # type: ignore[arg-type]
    evaluator = Engine(nothing, coordinator=Alone(), name="evaluator")
    seen: list[int] = []
    evaluator.add_event_handler(Events.COMPLETED, lambda: seen.append(trainer.state.iteration))
    if every is not None:
        Evaluate(evaluator, [0], every=every, clock=lambda: now[0]).attach(trainer)
    trainer.run([0] * 60, window=2)
    return seen, len(counting.calls)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_evaluate_when_rank_0s_time_is_up_without_a_collective(ranks: int) -> None:
    results = simulate(_by_time, ranks, "10 seconds")
    seen = results[0][0]
    assert [each[0] for each in results] == [seen] * ranks
    # Within two windows and one iteration of the time; the last at the run's end.
    assert seen[-1] == 60
    apart = [later - earlier for earlier, later in zip([0, *seen], seen[:-1], strict=False)]
    assert len(apart) >= 3
    assert all(10 <= each <= 15 for each in apart)
    assert [each[1] for each in results] == [each[1] for each in simulate(_by_time, ranks, None)]


def _over_gloo(world: World) -> tuple[list[int], float]:
    trainer = Engine(lambda engine, batch: world.all_reduce(1.0))
    evaluator = Engine(lambda engine, batch: torch.tensor([float(world.rank)]), name="evaluator")
    Metrics({"rank": Mean()}).attach(evaluator)
    seen: list[int] = []
    evaluator.add_event_handler(Events.COMPLETED, lambda: seen.append(trainer.state.iteration))
    Evaluate(evaluator, [0], every=("0.05 seconds", 100)).attach(trainer)
    trainer.run([0] * 400)
    return seen, float(trainer.state.metrics["val/rank"])


@pytest.mark.slow
def test_real_ranks_evaluate_together() -> None:
    left, right = run_ranks(_over_gloo, 2)
    assert left == right
    assert left[1] == 0.5
    assert {100, 200, 300, 400} <= set(left[0])
    assert left[0] == sorted(set(left[0]))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"every": 0}, ValueError, "every is 0"),
        ({"every": "fortnight"}, ValueError, "every is 'fortnight'"),
        ({"every": ()}, ValueError, "every is ()"),
        ({"evaluator": 3}, TypeError, "evaluator is 3"),
    ],
)
def test_wrong_arguments_are_named(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text.replace("(", r"\(").replace(")", r"\)")):
        Evaluate(**({"evaluator": Engine(nothing), "data": []} | given))
