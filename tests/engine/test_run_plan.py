"""What a call of run does: begin anew, go on, or refuse, with every argument."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

from allstep.engine import Engine, Events
from allstep.errors import DataError
from tests.engine.recording import NoLength, batches_of, nothing, record


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


@pytest.mark.parametrize(("length", "epochs"), [(3, 3), (None, 3), (100, 1)])
@pytest.mark.parametrize("data", [range(3), NoLength(3)])
def test_max_iters_ends_the_run_in_the_middle_of_an_epoch(data: Any, length: int | None, epochs: int) -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED)
    state = engine.run(data, max_iters=8, epoch_length=length)
    assert (state.iteration, state.epoch, state.max_epochs, state.max_iters) == (8, epochs, None, 8)
    assert [name for name, _, _ in seen] == [*["EPOCH_COMPLETED"] * (epochs - 1), "TERMINATE", "COMPLETED"]


def test_max_iters_that_fall_on_an_epochs_end_complete_that_epoch() -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED)
    engine.run(range(3), max_iters=6)
    assert [name for name, _, _ in seen] == ["EPOCH_COMPLETED", "EPOCH_COMPLETED", "COMPLETED"]


def test_max_iters_are_all_run_when_an_epoch_of_unknown_length_was_cut() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate_epoch)
    assert engine.run(NoLength(5), max_iters=14).iteration == 14


def test_max_epochs_and_max_iters_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Engine(nothing).run(range(3), max_epochs=1, max_iters=1)


@pytest.mark.parametrize("name", ["max_epochs", "max_iters", "epoch_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_numbers_below_one_are_refused_with_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Engine(nothing).run(range(3), **{name: value})


def test_numpy_integers_are_integers() -> None:
    assert Engine(nothing).run(range(3), max_epochs=np.int64(2), epoch_length=np.int32(4)).iteration == 8  # type: ignore[arg-type]


def test_data_that_cannot_be_iterated_is_refused() -> None:
    with pytest.raises(TypeError, match="must be iterable"):
        Engine(nothing).run(3)


def test_a_second_run_of_a_finished_engine_starts_anew() -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=2)
    seen, batches = record(engine, Events.STARTED), batches_of(engine)
    state = engine.run(range(4), max_epochs=2)
    assert seen == [("STARTED", 0, 0)]
    assert batches == [0, 1, 2, 3] * 2
    assert (state.iteration, state.epoch, state.epoch_length) == (8, 2, 4)


def test_a_second_run_without_max_epochs_runs_one_epoch() -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=2)
    assert engine.run(range(3)).epoch == 1


def test_filters_begin_anew_with_the_counters() -> None:
    engine = Engine(nothing)
    due: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: due.append(e.state.iteration))
    engine.add_event_handler(Events.EPOCH_COMPLETED(every=2), lambda e: due.append(-e.state.epoch))
    for _ in range(2):
        engine.run(range(3), max_epochs=2)
    assert due == [2, -2, 2, -2]


def test_larger_max_epochs_continue() -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=2)
    batches, seen = batches_of(engine), record(engine, Events.EPOCH_STARTED)
    state = engine.run(range(3), max_epochs=4)
    assert batches == [0, 1, 2] * 2
    assert seen == [("EPOCH_STARTED", 3, 6), ("EPOCH_STARTED", 4, 9)]
    assert (state.iteration, state.epoch) == (12, 4)


def test_larger_max_epochs_continue_without_data_with_the_former_data() -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=1)
    batches = batches_of(engine)
    engine.run(max_epochs=2)
    assert batches == [0, 1, 2]


def test_larger_max_iters_continue_in_the_middle_of_the_epoch() -> None:
    engine = Engine(nothing)
    batches, seen = batches_of(engine), record(engine, Events.EPOCH_COMPLETED)
    engine.run(range(5), max_iters=3)
    engine.run(range(5), max_iters=7)
    assert batches == [0, 1, 2, 3, 4, 0, 1]
    assert seen == [("EPOCH_COMPLETED", 1, 5)]


def test_larger_max_epochs_continue_data_longer_than_the_epoch_where_it_was() -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.run(range(5), max_epochs=2, epoch_length=2)
    engine.run(range(5), max_epochs=4)
    assert batches == [0, 1, 2, 3, 4, 0, 1, 2]


@pytest.mark.parametrize(("name", "smaller"), [("max_epochs", 2), ("max_iters", 8)])
def test_a_smaller_maximum_is_refused_and_changes_nothing(name: str, smaller: int) -> None:
    engine = Engine(nothing)
    engine.run(range(3), **{name: 3 if name == "max_epochs" else 9})
    before = dict(vars(engine.state))
    with pytest.raises(ValueError, match=f"{name} is {smaller}, but the state has reached"):
        engine.run(range(3), **{name: smaller})
    assert vars(engine.state) == before


def test_a_maximum_set_to_none_begins_anew() -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=3)
    engine.state.max_epochs = None
    assert engine.run(range(3), max_epochs=1).iteration == 3


def test_the_unit_of_an_unfinished_run_cannot_be_changed() -> None:
    engine = Engine(nothing)
    with engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), engine.terminate):
        engine.run(range(3), max_epochs=3)
    with pytest.raises(ValueError, match="counted in epochs"):
        engine.run(range(3), max_iters=20)


def test_the_epoch_length_of_an_unfinished_run_cannot_be_changed() -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=1)
    with pytest.raises(ValueError, match="epoch_length is 5, but the run to continue has 3"):
        engine.run(range(3), max_epochs=2, epoch_length=5)


@pytest.mark.parametrize("make", [lambda: NoLength(5), lambda: iter(range(5)), lambda: DataLoader(Stream())])
def test_data_without_a_length_never_inherits_the_length_of_other_data(make: Callable[[], Any]) -> None:
    engine = Engine(nothing)
    engine.run(range(3))
    data = make()
    expected = 6 if isinstance(data, DataLoader) else 5
    assert engine.run(data).iteration == expected
    assert engine.state.epoch_length == expected


def test_the_same_data_keeps_the_length_that_was_learnt() -> None:
    engine, data = Engine(nothing), NoLength(4)
    engine.run(data)
    lengths: list[Any] = []
    engine.add_event_handler(Events.STARTED, lambda e: lengths.append(e.state.epoch_length))
    engine.run(data)
    assert lengths == [4]


@pytest.mark.parametrize("data", [[], (), range(0)])
def test_empty_data_with_a_length_is_refused_before_anything_happens(data: Any) -> None:
    engine = Engine(nothing)
    seen = record(engine)
    with pytest.raises(DataError, match="empty"):
        engine.run(data)
    assert seen == []
    assert engine.state.max_epochs is None


def test_the_unit_can_be_changed_after_a_finished_run() -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=2)
    state = engine.run(range(3), max_iters=4)
    assert (state.iteration, state.max_epochs, state.max_iters) == (4, None, 4)
