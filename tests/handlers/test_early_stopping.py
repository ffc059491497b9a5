"""EarlyStopping: what counts as an improvement, and that one rank's verdict stops all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from allstep import Alone, EarlyStopping, Engine, Events
from allstep.testing import SimulatedRank, simulate


def stopped_after(scores: Sequence[float], patience: int, **options: Any) -> int:
    trainer = Engine(lambda engine, batch: None, coordinator=Alone())
    stopping = EarlyStopping(patience, lambda engine: scores[engine.state.epoch - 1], trainer, **options)
    stopping.attach(trainer, Events.EPOCH_COMPLETED)
    return trainer.run([0], max_epochs=len(scores)).epoch


@pytest.mark.parametrize(
    ("scores", "patience", "options", "epochs"),
    [
        ([1, 2, 3, 4], 1, {}, 4),
        ([1, 1, 2, 3], 1, {}, 2),
        ([1, 0, 2, 1, 1, 3], 2, {}, 5),
        ([1, 0, 0, 0, 0], 3, {}, 4),
        ([1, 1.4, 1.8, 2.2, 2.6], 2, {"min_delta": 0.5}, 3),
        ([1, 1.4, 1.8, 2.2, 2.6], 2, {"min_delta": 0.5, "cumulative": True}, 5),
        ([1, math.nan, 2, math.nan, math.nan], 2, {}, 5),
        ([math.nan, math.nan, 1], 2, {}, 2),
    ],
)
def test_ends_the_run_once_the_score_has_not_improved_for_patience_events(
    scores: list[float], patience: int, options: dict[str, Any], epochs: int
) -> None:
    assert stopped_after(scores, patience, **options) == epochs


def test_the_reason_names_the_best_score() -> None:
    trainer = Engine(lambda engine, batch: None, coordinator=Alone())
    EarlyStopping(2, lambda engine: 0.5, trainer).attach(trainer, Events.EPOCH_COMPLETED)
    assert trainer.run([0], max_epochs=9).stop_reason == "rank 0: no better score than 0.5 in 2 times"


def test_by_default_it_follows_the_runs_of_an_evaluator() -> None:
    trainer = Engine(lambda engine, batch: None, coordinator=Alone())
    evaluator = Engine(lambda engine, batch: None, coordinator=Alone())
    EarlyStopping(3, lambda engine: 1.0, trainer).attach(evaluator)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0, 0]))
    assert trainer.run([0], max_epochs=9).epoch == 4


def test_a_loaded_state_goes_on_where_the_saved_one_stood() -> None:
    trainer = Engine(lambda engine, batch: None, coordinator=Alone())
    first, second = (EarlyStopping(3, lambda engine: 1.0, trainer) for _ in range(2))
    first(trainer)
    first(trainer)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"best_score": 1.0, "counter": 1}
    second.attach(trainer, Events.EPOCH_COMPLETED)
    assert trainer.run([0], max_epochs=9).epoch == 2


def test_a_state_that_lacks_a_key_is_refused() -> None:
    trainer = Engine(lambda engine, batch: None)
    with pytest.raises(ValueError, match="lacks counter"):
        EarlyStopping(1, lambda engine: 0.0, trainer).load_state_dict({"best_score": 1.0})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"patience": 0}, ValueError, "patience is 0"),
        ({"patience": 1.5}, ValueError, "patience is 1.5"),
        ({"min_delta": -1}, ValueError, "min_delta is -1"),
        ({"min_delta": math.nan}, ValueError, "min_delta is nan"),
        ({"score_function": 3}, TypeError, "score_function is 3"),
        ({"trainer": None}, TypeError, "trainer is None"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    right = {"patience": 1, "score_function": lambda engine: 0.0, "trainer": Engine(lambda engine, batch: None)}
    with pytest.raises(error, match=text):
        EarlyStopping(**(right | arguments))


def _stop_by_a_private_score(coordinator: SimulatedRank) -> tuple[int, int, str | None]:
    trainer = Engine(lambda engine, batch: None, coordinator=coordinator, name="trainer")

    def score(engine: Engine) -> float:
        return 0.0 if coordinator.rank == 2 else engine.state.epoch

    EarlyStopping(2, score, trainer).attach(trainer, Events.EPOCH_COMPLETED)
    state = trainer.run([0] * 5, max_epochs=9)
    return state.epoch, state.iteration, state.stop_reason


def test_the_rank_that_loses_patience_stops_all_at_the_end_of_that_epoch() -> None:
    expected = (3, 15, "rank 2: no better score than 0.0 in 2 times")
    assert simulate(_stop_by_a_private_score, 3) == [expected] * 3


def _scores_seen(coordinator: SimulatedRank) -> tuple[int, list[int], list[int]]:
    trainer = Engine(lambda engine, batch: batch, coordinator=coordinator, name="trainer")
    by_iteration: list[int] = []
    by_epoch: list[int] = []

    def seen(into: list[int]) -> Any:
        def score(engine: Engine) -> float:
            into.append(engine.state.iteration)
            return engine.state.iteration

        return score

    EarlyStopping(1, seen(by_iteration), trainer).attach(trainer, Events.ITERATION_COMPLETED)
    EarlyStopping(1, seen(by_epoch), trainer).attach(trainer, Events.EPOCH_COMPLETED)
    state = trainer.run([0] * (2 if coordinator.rank else 4), max_epochs=2, uneven="longest")
    return state.iteration, by_iteration, by_epoch


def test_iterations_without_a_batch_do_not_count_and_epoch_ends_do() -> None:
    full, short = simulate(_scores_seen, 2)
    assert full == (8, [1, 2, 3, 4, 5, 6, 7, 8], [4, 8])
    assert short == (8, [1, 2, 5, 6], [4, 8])
