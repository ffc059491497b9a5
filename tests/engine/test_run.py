import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from allstep.engine import Engine, Events
from allstep.errors import DataError, EngineError
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
        ("ITERATION_COMPLETED", 1, 1),
        ("GET_BATCH_STARTED", 1, 1),
        ("GET_BATCH_COMPLETED", 1, 1),
        ("ITERATION_STARTED", 1, 2),
        ("ITERATION_COMPLETED", 1, 2),
        ("EPOCH_COMPLETED", 1, 2),
        ("EPOCH_STARTED", 2, 2),
        ("GET_BATCH_STARTED", 2, 2),
        ("DATALOADER_STOP_ITERATION", 2, 2),
        ("GET_BATCH_COMPLETED", 2, 2),
        ("ITERATION_STARTED", 2, 3),
        ("ITERATION_COMPLETED", 2, 3),
        ("GET_BATCH_STARTED", 2, 3),
        ("GET_BATCH_COMPLETED", 2, 3),
        ("ITERATION_STARTED", 2, 4),
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
        *["STARTED", "EPOCH_STARTED", "ITERATION_STARTED", "ITERATION_COMPLETED", "EPOCH_COMPLETED", "COMPLETED"]
    }


def test_without_data_and_length_there_is_nothing_to_run() -> None:
    with pytest.raises(ValueError, match="epoch_length"):
        Engine(nothing).run()


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


def test_max_iters_are_all_run_also_when_an_epoch_was_cut_before_the_length_was_learnt() -> None:
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
def test_a_smaller_maximum_is_refused_with_what_was_reached_and_changes_nothing(name: str, smaller: int) -> None:
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
def test_a_one_shot_iterator_that_ran_dry_ends_the_run_with_one_warning_and_no_empty_epoch(
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


class Told:
    """Data of which each pass says which epoch it was told."""

    def __init__(self, length: int = 3) -> None:
        self.length = length
        self.epoch: int | None = None
        self.calls: list[str] = []

    def set_epoch(self, epoch: int) -> None:
        self.calls.append(f"set {epoch}")
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        self.calls.append("iter")
        return iter([(self.epoch, n) for n in range(self.length)])


def test_set_epoch_is_called_before_the_iteration_of_each_epoch_begins() -> None:
    engine, data = Engine(nothing), Told()
    batches = batches_of(engine)
    engine.run(data, max_epochs=3)
    assert data.calls == ["set 0", "iter", "set 1", "iter", "set 2", "iter"]
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


class Holder:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)

    def __iter__(self) -> Iterator[int]:
        return iter(range(2))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda told: Holder(sampler=told),
        lambda told: Holder(batch_sampler=told, sampler=Holder()),
        lambda told: Holder(batch_sampler=Holder(sampler=told), sampler=Holder()),
    ],
    ids=["sampler", "batch sampler", "sampler of the batch sampler"],
)
def test_set_epoch_of_the_sampler_is_called(wrap: Callable[[Told], Any]) -> None:
    told = Told()
    Engine(nothing).run(wrap(told), max_epochs=2)
    assert told.calls == ["set 0", "set 1"]


def test_only_the_first_that_has_set_epoch_is_told() -> None:
    first, second = Told(), Told()
    Engine(nothing).run(Holder(batch_sampler=first, sampler=second))
    assert first.calls
    assert not second.calls


def test_a_distributed_sampler_shuffles_each_epoch_otherwise() -> None:
    class Numbers(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

        def __len__(self) -> int:
            return 32

    sampler: DistributedSampler[int] = DistributedSampler(Numbers(), num_replicas=1, rank=0, shuffle=True)  # type: ignore[arg-type]
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.run(DataLoader(Numbers(), batch_size=32, sampler=sampler), max_epochs=2)
    assert batches[0].tolist() != batches[1].tolist()
    assert sorted(batches[0].tolist()) == sorted(batches[1].tolist()) == list(range(32))


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


def test_times_of_epochs_and_of_the_run_are_there_for_handlers_and_begin_at_zero() -> None:
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


def test_the_unit_can_be_changed_after_a_finished_run() -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=2)
    state = engine.run(range(3), max_iters=4)
    assert (state.iteration, state.max_epochs, state.max_iters) == (4, None, 4)
