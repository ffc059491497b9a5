import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from allstep.data import ShardedBatchSampler
from allstep.engine import Engine, Events
from allstep.errors import DataError, EngineError
from tests.engine.recording import NoLength, batches_of, nothing, record


def saved_after(iteration: int, data: Any, **terms: Any) -> dict[str, Any]:
    """The state of a run over `data` that was saved in ITERATION_COMPLETED and went through JSON."""
    engine = Engine(nothing)
    saved: list[str] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=iteration), lambda e: saved.append(json.dumps(e.state_dict()))
    )
    engine.run(data, **terms)
    restored: dict[str, Any] = json.loads(saved[0])
    return restored


def run_from(state: dict[str, Any], data: Any, **terms: Any) -> tuple[Engine, list[Any], list[tuple[str, int, int]]]:
    engine = Engine(nothing)
    engine.load_state_dict(state)
    batches, seen = batches_of(engine), record(engine, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
    engine.run(data, **terms)
    return engine, batches, seen


def test_the_state_of_a_run_says_where_it_stands_in_plain_numbers() -> None:
    assert saved_after(5, range(3), max_epochs=4) == {
        "iteration": 5,
        "epochs_completed": 1,
        "epoch_began_at": 3,
        "epoch_length": 3,
        "epoch_is_pass": True,
        "max_epochs": 4,
    }


def test_the_state_of_a_run_counted_in_iterations_has_max_iters() -> None:
    state = saved_after(5, range(3), max_iters=7)
    assert state["max_iters"] == 7
    assert "max_epochs" not in state


@pytest.mark.parametrize(
    ("event", "iteration"),
    [(Events.GET_BATCH_COMPLETED, 0), (Events.ITERATION_STARTED, 0), (Events.ITERATION_COMPLETED, 1)],
)
def test_the_state_counts_completed_steps_only(event: Events, iteration: int) -> None:
    engine = Engine(nothing)
    saved: list[int] = []
    engine.add_event_handler(event, lambda e: saved.append(e.state_dict()["iteration"]))
    engine.run(range(3))
    assert saved[0] == iteration


def test_a_state_counted_in_epochs_resumes_at_that_epochs_beginning() -> None:
    engine, batches, seen = run_from({"epoch": 2, "max_epochs": 3, "epoch_length": 3}, range(3))
    assert batches == [0, 1, 2]
    assert seen == [("EPOCH_STARTED", 3, 6), ("EPOCH_COMPLETED", 3, 9)]
    assert engine.state.iteration == 9


def test_a_state_of_ignite_with_an_iteration_resumes_inside_the_epoch() -> None:
    _, batches, seen = run_from({"iteration": 4, "max_epochs": 3, "epoch_length": 3}, range(3))
    assert batches == [1, 2, 0, 1, 2]
    assert seen[:2] == [("EPOCH_STARTED", 2, 4), ("EPOCH_COMPLETED", 2, 6)]


def test_a_state_with_max_iters_resumes_to_that_many() -> None:
    engine, batches, _ = run_from({"iteration": 2, "max_iters": 7, "epoch_length": 4}, range(4))
    assert batches == [2, 3, 0, 1, 2]
    assert engine.state.max_epochs is None


@pytest.mark.parametrize("length", [None, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("iteration", range(1, 14))
def test_a_run_resumed_anywhere_takes_the_batches_that_were_left(length: int | None, iteration: int) -> None:
    terms = {"max_epochs": 14 // (length or 4), "epoch_length": length}
    plain = Engine(nothing)
    expected, events = batches_of(plain), record(plain, Events.EPOCH_COMPLETED)
    plain.run(range(4), **terms)
    if iteration > plain.state.iteration:
        iteration = plain.state.iteration
    state = saved_after(iteration, range(4), **terms)
    engine = Engine(nothing)
    engine.load_state_dict(state)
    batches, seen = batches_of(engine), record(engine, Events.EPOCH_COMPLETED)
    engine.run(range(4))
    assert batches == expected[iteration:]
    assert seen == [entry for entry in events if entry[2] >= iteration]


def test_a_run_over_data_of_unknown_length_resumes_inside_its_first_epoch() -> None:
    state = saved_after(2, NoLength(5), max_epochs=2)
    assert state["epoch_length"] is None
    engine, batches, _ = run_from(state, NoLength(5))
    assert batches == [2, 3, 4, 0, 1, 2, 3, 4]
    assert engine.state.epoch_length == 5


def test_a_run_with_an_epoch_that_was_cut_resumes_at_the_right_batch() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate_epoch)
    saved: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda e: saved.append(e.state_dict()))
    expected = batches_of(engine)
    engine.run(range(4), max_epochs=3)
    _, batches, seen = run_from(saved[0], range(4))
    assert batches == expected[5:]
    assert seen[0] == ("EPOCH_STARTED", 2, 5)


@pytest.mark.parametrize("length", [3, 7])
@pytest.mark.parametrize("iteration", [4, 6, 8, 9, 10, 11, 12, 13])
def test_a_run_with_a_cut_epoch_and_passes_of_another_length_resumes(length: int, iteration: int) -> None:
    """Epochs of 5 iterations over passes of 3 or 7 batches; the second is cut after two."""

    def cut(engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=7), engine.terminate_epoch)

    engine = Engine(nothing)
    cut(engine)
    saved: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=iteration), lambda e: saved.append(e.state_dict()))
    expected = batches_of(engine)
    engine.run(range(length), max_epochs=4, epoch_length=5)
    again = Engine(nothing)
    cut(again)
    again.load_state_dict(json.loads(json.dumps(saved[0])))
    batches = batches_of(again)
    again.run(range(length))
    assert batches == expected[iteration:]


def test_a_fresh_generator_is_read_up_to_the_place_to_resume_at() -> None:
    def make() -> Iterator[int]:
        yield from range(6)

    _, batches, _ = run_from({"iteration": 2, "max_epochs": 1, "epoch_length": 6}, make())
    assert batches == [2, 3, 4, 5]


class Skipping:
    """Data that can begin anywhere; keeps what was read and asked of it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.start = 0
        self.read: list[int] = []
        self.calls: list[tuple[str, int]] = []

    def set_epoch(self, epoch: int) -> None:
        self.calls.append(("set_epoch", epoch))

    def skip_batches(self, count: int) -> None:
        self.calls.append(("skip_batches", count))
        self.start = count

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        for n in range(start, self.length):
            self.read.append(n)
            yield n


def test_data_that_can_skip_is_told_to_and_reads_nothing_that_was_consumed() -> None:
    data = Skipping(5)
    _, batches, _ = run_from({"iteration": 8, "max_epochs": 3, "epoch_length": 5}, data)
    assert batches == [3, 4, 0, 1, 2, 3, 4]
    assert data.read == batches
    assert data.calls == [("set_epoch", 1), ("skip_batches", 3), ("set_epoch", 2)]


def test_the_batch_sampler_is_told_to_skip_where_the_loader_cannot() -> None:
    class Numbers:
        def __init__(self) -> None:
            self.read: list[int] = []

        def __getitem__(self, index: int) -> int:
            self.read.append(index)
            return index

        def __len__(self) -> int:
            return 10

    def loader(numbers: Numbers) -> DataLoader[int]:
        sampler = ShardedBatchSampler(10, batch_size=2, shuffle=True, seed=3)
        return DataLoader(numbers, batch_sampler=sampler)  # type: ignore[arg-type]

    plain = Engine(nothing)
    expected = batches_of(plain)
    plain.run(loader(Numbers()), max_epochs=3)
    numbers = Numbers()
    _, batches, _ = run_from({"iteration": 8, "max_epochs": 3, "epoch_length": 5}, loader(numbers))
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in expected[8:]]
    assert len(numbers.read) == 2 * len(batches)


def test_a_pass_over_two_epochs_resumes_in_the_order_of_the_first() -> None:
    class Shuffled(Skipping):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[Any]:
            start, self.start = self.start, 0
            return iter([(self.epoch, n) for n in range(start, self.length)])

    plain = Engine(nothing)
    expected = batches_of(plain)
    plain.run(Shuffled(10), max_epochs=6, epoch_length=4)
    for iteration in range(24):
        _, batches, _ = run_from({"iteration": iteration, "max_epochs": 6, "epoch_length": 4}, Shuffled(10))
        assert batches == expected[iteration:], f"resumed at {iteration}"


def test_data_with_less_than_was_consumed_is_an_error_that_says_both() -> None:
    engine = Engine(nothing)
    engine.load_state_dict({"iteration": 4, "max_epochs": 1, "epoch_length": 6})
    with pytest.raises(DataError, match="ended after 3 batches, but the run to continue has consumed 4"):
        engine.run(iter(range(3)))


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 3, "max_epochs": 3, "epoch_length": 4},
        {"iteration": 12, "max_epochs": 3, "epoch_length": 4},
        {"iteration": 9, "max_iters": 9, "epoch_length": 4},
    ],
)
def test_a_finished_state_returns_at_once_each_time_and_says_so(
    state: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(nothing)
    engine.load_state_dict(state)
    seen = record(engine)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            engine.run(range(4))
        assert "nothing to run" in caplog.text
    assert seen == []
    assert engine.state.iteration == state.get("iteration", 12)


def test_a_finished_state_goes_on_with_a_larger_maximum() -> None:
    _, batches, _ = run_from({"epoch": 3, "max_epochs": 3, "epoch_length": 4}, range(4), max_epochs=4)
    assert batches == [0, 1, 2, 3]


def test_a_restored_run_that_was_finished_begins_anew_when_run_again() -> None:
    engine, _, _ = run_from({"epoch": 1, "max_epochs": 2, "epoch_length": 3}, range(3))
    assert engine.run(range(3), max_epochs=2).iteration == 6
    assert engine.state.epoch == 2
    seen = record(engine, Events.STARTED)
    engine.run(range(3), max_epochs=2)
    assert seen == [("STARTED", 0, 0)]


def test_a_state_saved_after_an_epochs_last_step_resumes_with_that_epochs_end() -> None:
    _, batches, seen = run_from(saved_after(3, range(3), max_epochs=2), range(3))
    assert batches == [0, 1, 2]
    assert seen == [
        ("EPOCH_STARTED", 1, 3),
        ("EPOCH_COMPLETED", 1, 3),
        ("EPOCH_STARTED", 2, 3),
        ("EPOCH_COMPLETED", 2, 6),
    ]


def test_a_state_saved_in_an_epochs_end_resumes_with_the_next_epoch() -> None:
    engine, saved = Engine(nothing), []
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda e: saved.append(e.state_dict()))
    engine.run(range(3), max_epochs=2)
    _, batches, seen = run_from(saved[0], range(3))
    assert batches == [0, 1, 2]
    assert seen == [("EPOCH_STARTED", 2, 3), ("EPOCH_COMPLETED", 2, 6)]


def test_a_run_that_went_on_with_larger_batches_keeps_its_optimizer_steps() -> None:
    state = saved_after(3, range(3), max_epochs=3) | {"inner_iterations": -3}  # 6 steps of before are 3 iterations now
    engine, _, _ = run_from(state, range(3))
    assert (engine.state.iteration, engine.state.optimizer_steps) == (9, 12)
    assert engine.state_dict()["inner_iterations"] == -3
    with pytest.raises(ValueError, match="inner_iterations is 'three'"):
        Engine(nothing).load_state_dict(state | {"inner_iterations": "three"})


def test_user_keys_are_saved_and_loaded() -> None:
    one, other = Engine(nothing), Engine(nothing)
    for engine in (one, other):
        engine.state_dict_user_keys.append("alpha")
    one.state.alpha = 0.5  # type: ignore[attr-defined]
    one.run(range(3))
    other.load_state_dict(one.state_dict())
    assert other.state.alpha == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"iteration": 1, "max_epochs": 3}, "epoch_length"),
        ({"max_epochs": 3, "epoch_length": 3}, "exactly one of iteration and epoch"),
        ({"iteration": 1, "epoch": 1, "max_epochs": 3, "epoch_length": 3}, "exactly one of iteration and epoch"),
        ({"iteration": 1, "epoch_length": 3}, "exactly one of max_epochs and max_iters"),
        ({"iteration": 1, "max_epochs": 1, "max_iters": 1, "epoch_length": 3}, "exactly one of max_epochs"),
        ({"epoch": 1, "max_epochs": 3, "epoch_length": None}, "needs an epoch_length"),
        ({"epoch": 1, "max_epochs": 3, "epoch_length": 0}, "epoch_length is 0"),
    ],
)
def test_a_state_that_lacks_or_contradicts_something_changes_nothing(state: dict[str, Any], message: str) -> None:
    engine = Engine(nothing)
    engine.run(range(3), max_epochs=2)
    before, saved = dict(vars(engine.state)), engine.state_dict()
    with pytest.raises(ValueError, match=message):
        engine.load_state_dict(state)
    assert vars(engine.state) == before
    assert engine.state_dict() == saved


def test_a_missing_user_key_is_refused_and_changes_nothing() -> None:
    engine = Engine(nothing)
    engine.state_dict_user_keys.append("alpha")
    with pytest.raises(ValueError, match="alpha"):
        engine.load_state_dict({"iteration": 1, "max_epochs": 3, "epoch_length": 3})
    assert engine.state.iteration == 0


def test_a_suspended_run_is_dropped_by_loading_a_state() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    engine.run(range(3), max_epochs=2)
    engine.load_state_dict({"iteration": 4, "max_epochs": 2, "epoch_length": 3})
    batches = batches_of(engine)
    engine.run(range(3))
    assert batches == [1, 2]


def test_a_state_cannot_be_loaded_while_the_engine_runs() -> None:
    engine = Engine(nothing)
    state = {"epoch": 0, "max_epochs": 1, "epoch_length": 3}
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.load_state_dict(state))
    with pytest.raises(EngineError, match="is running"):
        engine.run(range(3))


def test_filters_know_the_place_of_a_loaded_state() -> None:
    engine = Engine(nothing)
    due: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=4), lambda e: due.append(e.state.iteration))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=[2, 7]), lambda e: due.append(e.state.iteration))
    engine.load_state_dict({"iteration": 5, "max_iters": 12, "epoch_length": 6})
    engine.run(range(6))
    assert due == [7, 8, 12]
