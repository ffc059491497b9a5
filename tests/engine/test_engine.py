"""What a whole run does: the order of events, outputs, lengths, and what users set and see."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from allstep.engine import Engine, Events
from allstep.errors import EngineError
from allstep.trainers import create_supervised_evaluator
from tests.engine.recording import NoLength, batches_of, nothing, record, same


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


def numbers(n: int) -> Iterator[int]:
    yield from range(n)


def test_the_order_of_events_of_a_whole_run() -> None:
    engine = Engine(nothing)
    seen = record(engine)
    engine.run(range(2), max_epochs=2)

    assert seen == [
        ("STARTED", 0, 0),
        ("EPOCH_STARTED", 1, 0),
        ("GET_BATCH_STARTED", 1, 0),
        ("GET_BATCH_COMPLETED", 1, 0),
        ("ITERATION_STARTED", 1, 1),
        ("OPTIMIZER_STEP_COMPLETED", 1, 1),
        ("ITERATION_COMPLETED", 1, 1),
        ("GET_BATCH_STARTED", 1, 1),
        ("GET_BATCH_COMPLETED", 1, 1),
        ("ITERATION_STARTED", 1, 2),
        ("OPTIMIZER_STEP_COMPLETED", 1, 2),
        ("ITERATION_COMPLETED", 1, 2),
        ("EPOCH_COMPLETED", 1, 2),
        ("EPOCH_STARTED", 2, 2),
        ("GET_BATCH_STARTED", 2, 2),
        ("DATALOADER_STOP_ITERATION", 2, 2),
        ("GET_BATCH_COMPLETED", 2, 2),
        ("ITERATION_STARTED", 2, 3),
        ("OPTIMIZER_STEP_COMPLETED", 2, 3),
        ("ITERATION_COMPLETED", 2, 3),
        ("GET_BATCH_STARTED", 2, 3),
        ("GET_BATCH_COMPLETED", 2, 3),
        ("ITERATION_STARTED", 2, 4),
        ("OPTIMIZER_STEP_COMPLETED", 2, 4),
        ("ITERATION_COMPLETED", 2, 4),
        ("EPOCH_COMPLETED", 2, 4),
        ("COMPLETED", 2, 4),
    ]


@pytest.mark.parametrize("output", [None, 0.5, {"loss": torch.ones(2)}, [1, "a"], object()])
def test_what_the_step_returns_is_the_output_whatever_its_type(output: Any) -> None:
    engine = Engine(lambda engine, batch: output)
    seen: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    state = engine.run(range(2))
    assert seen[0] is output
    assert seen[1] is output
    assert state is engine.state
    assert state.output is output


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (lambda: [0, 1, 2, 3, 4, 5], 6),
        (lambda: range(6), 6),
        (lambda: iter(range(6)), 6),
        (lambda: numbers(6), 6),
        (lambda: NoLength(6), 6),
        (lambda: {0: "a", 1: "b"}, 2),
        (lambda: DataLoader(TensorDataset(torch.arange(6)), batch_size=2), 3),
        (lambda: DataLoader(Stream(), batch_size=4), 2),
        (lambda: DataLoader(Stream(), batch_size=None), 6),
    ],
    ids=["list", "range", "iterator", "generator", "no length", "dict", "map dataset", "iterable dataset", "unbatched"],
)
def test_the_length_of_an_epoch_is_that_of_the_data_known_or_learnt(make: Callable[[], Any], length: int) -> None:
    state = Engine(nothing).run(make())
    assert (state.iteration, state.epoch, state.epoch_length) == (length, 1, length)


def test_a_length_that_must_be_learnt_is_unknown_during_the_first_epoch() -> None:
    engine = Engine(nothing)
    lengths: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: lengths.append(e.state.epoch_length))
    engine.run(NoLength(2), max_epochs=2)
    assert lengths == [None, None, 2, 2]


def test_the_last_output_is_there_when_an_epoch_ended_because_the_data_did() -> None:
    engine = Engine(same)
    seen: list[Any] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED, lambda e: seen.append(e.state.output))
    engine.run(NoLength(4))
    assert seen == [3, 3]


def test_without_data_batches_are_none_and_no_batch_events_are_fired() -> None:
    engine = Engine(nothing)
    batches, seen = batches_of(engine), record(engine)
    engine.run(max_epochs=2, epoch_length=3)
    assert batches == [None] * 6
    assert {name for name, _, _ in seen} == {
        *["STARTED", "EPOCH_STARTED", "ITERATION_STARTED", "OPTIMIZER_STEP_COMPLETED", "ITERATION_COMPLETED"],
        *["EPOCH_COMPLETED", "COMPLETED"],
    }


def test_without_data_and_length_there_is_nothing_to_run() -> None:
    with pytest.raises(ValueError, match="epoch_length"):
        Engine(nothing).run()


def test_running_an_engine_that_is_running_is_refused() -> None:
    engine = Engine(lambda engine, batch: engine.run(range(2)))
    with pytest.raises(EngineError, match="is running"):
        engine.run(range(3))


def test_another_engine_can_be_run_from_a_handler() -> None:
    inner, outer = Engine(nothing), Engine(nothing)
    iterations: list[int] = []
    outer.add_event_handler(Events.EPOCH_COMPLETED, lambda: iterations.append(inner.run(range(4)).iteration))
    outer.run(range(2), max_epochs=2)
    assert iterations == [4, 4]
    assert outer.state.iteration == 4


def test_a_handler_may_replace_the_batch_before_the_step() -> None:
    for event in (Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED):
        engine = Engine(same)
        outputs: list[Any] = []

        def double(e: Engine) -> None:
            e.state.batch *= 2

        engine.add_event_handler(event, double)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e, to=outputs: to.append(e.state.output))
        engine.run(range(3))
        assert outputs == [0, 2, 4]


def test_times_of_epochs_and_of_the_run_are_there_for_handlers() -> None:
    engine = Engine(nothing)
    at_start: list[dict[str, Any]] = []
    in_handlers: list[Any] = []
    engine.add_event_handler(Events.STARTED, lambda e: at_start.append(dict(e.state.times)))
    for name in ("EPOCH_COMPLETED", "COMPLETED"):
        engine.add_event_handler(Events[name], lambda e, name=name: in_handlers.append(e.state.times[name]))
    for _ in range(2):
        engine.run(range(3), max_epochs=2)
    assert at_start == [{"EPOCH_COMPLETED": 0.0, "COMPLETED": 0.0}] * 2
    assert len(in_handlers) == 6
    assert all(seconds > 0 for seconds in in_handlers)
    assert engine.state.times["COMPLETED"] >= engine.state.times["EPOCH_COMPLETED"] > 0  # type: ignore[operator]


def test_the_state_keeps_what_users_set_and_shows_it() -> None:
    engine = Engine(nothing)
    engine.state.mine = 5  # type: ignore[attr-defined]
    engine.run(range(2))
    assert engine.state.mine == 5  # type: ignore[attr-defined]
    assert "mine: 5" in repr(engine.state)
    assert engine.state.metrics == {}


def test_the_engine_says_nothing_when_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        Engine(nothing).run(range(3), max_epochs=2)
    assert not caplog.records


def with_schedule() -> Engine:
    engine = Engine(nothing)
    engine.add_event_handler(Events.OPTIMIZER_STEP_COMPLETED, lambda: None)
    return engine


@pytest.mark.parametrize(
    "make",
    [lambda: Engine(nothing), with_schedule, lambda: create_supervised_evaluator(nn.Linear(1, 1))],
    ids=["plain", "with a schedule", "evaluator"],
)
def test_data_of_an_engine_that_is_let_go_waits_for_no_collector(make: Callable[[], Engine]) -> None:
    # A DataLoader whose persistent workers are left to the collector cannot end them, which takes seconds each.
    engine, data = make(), DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), batch_size=2)
    gc.disable()
    try:
        engine.run(data)
        left = weakref.ref(data)
        del engine, data
        assert left() is None
    finally:
        gc.enable()


def test_a_state_that_outlives_its_engine_says_so_when_it_is_to_skip() -> None:
    state = Engine(nothing).state
    with pytest.raises(EngineError, match="outside a run"):
        state.skip()
