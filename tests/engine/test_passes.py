"""Passes over data in a world of one: shorter and longer than the epoch, endless, empty, and replaced."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from allstep.engine import Engine, Events
from allstep.errors import DataError
from tests.engine.recording import NoLength, batches_of, nothing, record


def numbers(n: int) -> Iterator[int]:
    yield from range(n)


def test_data_shorter_than_the_epoch_is_iterated_again_within_it() -> None:
    engine = Engine(nothing)
    batches, seen = batches_of(engine), record(engine, Events.DATALOADER_STOP_ITERATION, Events.EPOCH_COMPLETED)
    engine.run(range(3), max_epochs=2, epoch_length=5)
    assert batches == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert seen == [
        ("DATALOADER_STOP_ITERATION", 1, 3),
        ("EPOCH_COMPLETED", 1, 5),
        ("DATALOADER_STOP_ITERATION", 2, 6),
        ("DATALOADER_STOP_ITERATION", 2, 9),
        ("EPOCH_COMPLETED", 2, 10),
    ]


def test_data_longer_than_the_epoch_is_continued_in_the_next() -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.run(range(5), max_epochs=4, epoch_length=2)
    assert batches == [0, 1, 2, 3, 4, 0, 1, 2]


def test_an_endless_generator_is_continued_in_the_next_epoch() -> None:
    def endless() -> Iterator[int]:
        n = 0
        while True:
            yield n
            n += 1

    engine = Engine(nothing)
    batches = batches_of(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(endless(), max_epochs=3, epoch_length=3)
    assert batches == list(range(9))


def test_an_iterator_with_exactly_enough_batches_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = Engine(nothing).run(iter(range(6)), max_epochs=2, epoch_length=3)
    assert (state.epoch, state.iteration) == (2, 6)


@pytest.mark.parametrize("length", [None, 4])
@pytest.mark.parametrize("make", [lambda: iter(()), lambda: NoLength(0), lambda: numbers(0)])
def test_empty_data_without_a_length_is_an_error(make: Callable[[], Any], length: int | None) -> None:
    engine = Engine(nothing)
    with pytest.raises(DataError, match="empty"):
        engine.run(make(), epoch_length=length)
    assert engine.state.epoch_length == length


@pytest.mark.parametrize(
    ("length", "terms", "done", "total", "epochs"),
    [
        (4, {"max_epochs": 3}, 10, 12, 3),
        (5, {"max_epochs": 3}, 10, 15, 2),
        (None, {"max_epochs": 3}, 10, 30, 1),
        (20, {"max_epochs": 2}, 10, 40, 1),
        (4, {"max_iters": 11}, 10, 11, 3),
    ],
)
def test_an_iterator_that_ran_dry_ends_the_run_with_one_warning(
    length: int | None, terms: dict[str, int], done: int, total: int, epochs: int
) -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED)
    with pytest.warns(UserWarning, match=f"ran dry: {done} of {total} iterations") as caught:
        state = engine.run(iter(range(10)), epoch_length=length, **terms)
    assert len(caught) == 1
    assert (state.iteration, state.epoch) == (done, epochs)
    names = [name for name, _, _ in seen]
    assert names == ["EPOCH_STARTED", "EPOCH_COMPLETED"] * epochs + ["COMPLETED"]


def test_new_data_given_when_the_iterator_ends_keeps_the_run_going() -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda e: e.set_data(iter(range(10, 14))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = engine.run(iter(range(4)), max_epochs=3, epoch_length=4)
    assert batches == [0, 1, 2, 3, *[10, 11, 12, 13] * 2]
    assert state.epoch == 3


def test_terminating_when_the_iterator_ends_ends_the_run_without_warning() -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.EPOCH_STARTED, Events.TERMINATE, Events.COMPLETED)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, engine.terminate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(iter(range(4)), max_epochs=3, epoch_length=4)
    assert [name for name, _, _ in seen] == ["EPOCH_STARTED", "TERMINATE", "COMPLETED"]


def test_no_batch_of_an_iterator_is_lost_when_epochs_are_cut() -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.add_event_handler(Events.EPOCH_STARTED(every=2), engine.terminate_epoch)
    engine.run(iter(range(100)), max_epochs=5, epoch_length=2)
    assert batches == list(range(6))
