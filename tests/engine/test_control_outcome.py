"""What the end of a run means: finished, failed, preempted or left; and that a finished one is not trained again."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from allstep import Alone, Engine, Events
from allstep.testing import SimulatedRank, simulate
from tests.engine.recording import nothing


def ended_in_epoch_2(outcome: Any, event: Any = None) -> tuple[Engine, dict[str, Any]]:
    event = event or Events.EPOCH_COMPLETED(once=2)
    engine = Engine(nothing, coordinator=Alone())
    engine.add_event_handler(event, lambda: engine.terminate(reason="good enough", outcome=outcome))
    engine.run(range(3), max_epochs=5)
    return engine, copy.deepcopy(engine.state_dict())


def go_on(state: dict[str, Any], **terms: Any) -> Engine:
    engine = Engine(nothing, coordinator=Alone())
    engine.load_state_dict(state)
    engine.run(range(3), **terms)
    return engine


@pytest.mark.parametrize("event", [Events.EPOCH_COMPLETED(once=2), Events.ITERATION_COMPLETED(once=5)])
def test_a_run_ended_as_finished_trains_nothing_when_it_goes_on(event: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine, state = ended_in_epoch_2("finished", event)
    assert (engine.state.outcome, engine.state.stop_reason) == ("finished", "rank 0: good enough")
    assert state["finished"] == "rank 0: good enough"
    again = Engine(nothing, coordinator=Alone())
    fired: list[Any] = []
    again.add_event_handler(Events.STARTED | Events.ITERATION_STARTED | Events.COMPLETED, fired.append)
    again.load_state_dict(state)
    for _ in range(2):
        with caplog.at_level(logging.INFO):
            caplog.clear()
            again.run(range(3), max_epochs=5)
        assert "nothing to run: the run was finished: rank 0: good enough" in caplog.text
        assert fired == []
        assert (again.state.iteration, again.state.stop_reason) == (state["iteration"], "rank 0: good enough")
        assert again.state_dict()["finished"] == "rank 0: good enough"


def test_a_finished_run_asked_for_more_epochs_goes_on() -> None:
    _, state = ended_in_epoch_2("finished")
    engine = go_on(state, max_epochs=6)
    assert (engine.state.epoch, engine.state.iteration, engine.state.outcome) == (6, 18, None)
    assert "finished" not in engine.state_dict()


def test_a_finished_run_that_was_resumed_once_still_goes_on_for_more() -> None:
    _, state = ended_in_epoch_2("finished")
    engine = go_on(state, max_epochs=5)
    assert engine.run(range(3), max_epochs=6).iteration == 18


@pytest.mark.parametrize("outcome", ["left", "preempted", "failed"])
def test_any_other_end_is_gone_on_from(outcome: str) -> None:
    _, state = ended_in_epoch_2(outcome)
    assert "finished" not in state
    assert go_on(state, max_epochs=5).state.iteration == 15


def test_the_same_engine_that_is_run_again_goes_on_as_after_any_end() -> None:
    engine, _ = ended_in_epoch_2("finished")
    assert engine.run(range(3), max_epochs=5).epoch == 5


def test_an_outcome_that_does_not_exist_is_refused() -> None:
    engine = Engine(nothing, coordinator=Alone())
    with pytest.raises(ValueError, match="outcome is 'done'"):
        engine.terminate(outcome="done")  # type: ignore[arg-type]


def test_a_state_whose_finish_is_no_text_is_refused() -> None:
    state = {"iteration": 3, "epoch_length": 3, "max_epochs": 5, "finished": True}
    with pytest.raises(ValueError, match="finished is True"):
        Engine(nothing).load_state_dict(state)


def _all_ask(coordinator: SimulatedRank, asked: tuple[Any, ...]) -> tuple[int, Any, Any]:
    engine = Engine(nothing, coordinator=coordinator, name="trainer")
    outcome = asked[coordinator.rank]
    if outcome is not None:
        engine.add_event_handler(
            Events.EPOCH_COMPLETED(once=2), lambda: engine.terminate(reason=outcome, outcome=outcome)
        )
    state = engine.run(range(3), max_epochs=5)
    return state.iteration, state.stop_reason, state.outcome


@pytest.mark.parametrize(
    ("asked", "reason", "outcome"),
    [
        ((None, "finished"), "rank 1: finished", "finished"),
        (("left", "finished"), "rank 1: finished", "finished"),
        (("finished", "failed"), "rank 1: failed", "failed"),
        (("failed", "finished"), "rank 0: failed", "failed"),
        (("left", "preempted"), "rank 1: preempted", "preempted"),
        (("preempted", "finished"), "rank 1: finished", "finished"),
        (("left", "left"), "rank 0: left", "left"),
    ],
)
def test_ranks_agree_on_the_gravest_outcome_and_its_reason(asked: tuple[Any, ...], reason: str, outcome: str) -> None:
    assert simulate(_all_ask, 2, asked) == [(6, reason, outcome)] * 2


def _fails_in_the_last_window(coordinator: Any, accumulate: int, terms: dict[str, int]) -> tuple[Any, ...]:
    engine = Engine(nothing, coordinator=coordinator, accumulate=accumulate, name="trainer")
    fired: list[Any] = []
    engine.add_event_handler(Events.TERMINATE, lambda: fired.append((engine.state.outcome, engine.state.stop_reason)))
    if coordinator.rank == coordinator.world_size - 1:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=9), lambda: engine.terminate(reason="not finite", outcome="failed")
        )
    state = engine.run(range(100), **terms)
    result = state.iteration, state.outcome, state.stop_reason, list(fired)
    engine.run(max_iters=12)
    assert state.epoch == 1  # the epoch was not abandoned: the next run goes on in it
    return result


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_failure_in_the_last_window_before_max_iters_counts(accumulate: int) -> None:
    expected = (10, "failed", "rank 1: not finite", [("failed", "rank 1: not finite")])
    assert simulate(_fails_in_the_last_window, 2, accumulate, {"max_iters": 10}) == [expected] * 2


def test_so_it_does_on_one_rank_that_accumulates() -> None:
    expected = (10, "failed", "rank 0: not finite", [("failed", "rank 0: not finite")])
    assert _fails_in_the_last_window(Alone(), 2, {"max_iters": 10}) == expected


def test_a_run_that_max_iters_ended_goes_on_inside_the_epoch() -> None:
    engine = Engine(nothing, coordinator=Alone(), accumulate=2)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=9), engine.terminate)
    assert engine.run(range(15), max_iters=10).outcome == "left"
    seen: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(engine.state.batch))
    assert engine.run(max_iters=14).iteration == 14
    assert seen == [10, 11, 12, 13]
