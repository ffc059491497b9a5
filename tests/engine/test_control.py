from typing import Any

import pytest

from allstep.engine import Engine, Events
from tests.engine.recording import NoLength, Told, batches_of, nothing, record

STARTED = Events.STARTED
EVERY_EVENT = [
    STARTED,
    Events.EPOCH_STARTED,
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    Events.EPOCH_COMPLETED,
]


def after(seen: list[tuple[str, int, int]], event: Events, count: int) -> list[str]:
    """Names of what came after the `count`-th time that `event` was seen."""
    at = [n for n, (name, _, _) in enumerate(seen) if name == event.name][count - 1]
    return [name for name, _, _ in seen[at + 1 :]]


def ask_at(engine: Engine, event: Events, count: int, ask: Any) -> None:
    """Call `ask` when the event fires for the `count`-th time."""
    fired = iter(range(1, 10_000))
    engine.add_event_handler(event, lambda: ask() if next(fired) == count else None)


@pytest.mark.parametrize("event", EVERY_EVENT)
def test_terminate_ends_the_run_after_the_event_it_is_called_in(event: Events) -> None:
    engine = Engine(nothing)
    seen = record(engine)
    ask_at(engine, event, 1, engine.terminate)
    engine.run(range(3), max_epochs=3)
    assert after(seen, event, 1) == ["TERMINATE", "COMPLETED"]
    assert engine.should_terminate


def test_terminate_in_the_step_ends_the_run_after_the_iteration() -> None:
    engine = Engine(lambda engine, batch: engine.terminate() if batch == 1 else None)
    seen = record(engine)
    state = engine.run(range(3), max_epochs=3)
    assert [name for name, _, _ in seen[-3:]] == ["ITERATION_COMPLETED", "TERMINATE", "COMPLETED"]
    assert state.iteration == 2


def test_terminate_can_leave_out_completed() -> None:
    engine = Engine(nothing)
    seen = record(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate(skip_completed=True))
    engine.run(range(3))
    assert seen[-1] == ("TERMINATE", 1, 2)


def test_the_method_itself_can_be_the_handler() -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.TERMINATE_SINGLE_EPOCH, Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate_epoch)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=3), engine.terminate)
    engine.run(range(3), max_epochs=2)
    assert [name for name, _, _ in seen] == ["TERMINATE_SINGLE_EPOCH", "EPOCH_COMPLETED", "TERMINATE", "COMPLETED"]


def test_completed_is_fired_again_in_a_run_after_one_that_left_it_out() -> None:
    engine = Engine(nothing)
    with engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate(skip_completed=True)):
        engine.run(range(3), max_epochs=2)
    seen = record(engine, Events.COMPLETED)
    engine.run(range(3), max_epochs=2)
    assert len(seen) == 1


def test_a_run_after_terminate_goes_on_inside_the_epoch() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), engine.terminate)
    engine.run(range(3), max_epochs=4)
    batches, seen = batches_of(engine), record(engine, Events.EPOCH_STARTED)
    state = engine.run(range(3), max_epochs=4)
    assert seen == [("EPOCH_STARTED", 2, 5), ("EPOCH_STARTED", 3, 6), ("EPOCH_STARTED", 4, 9)]
    assert batches == [2, *[0, 1, 2] * 2]
    assert not engine.should_terminate
    assert state.iteration == 12


def test_a_run_after_terminate_at_an_epochs_end_goes_on_with_the_next_epoch() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=2), engine.terminate)
    assert engine.run(range(3), max_epochs=4).epoch == 2
    assert engine.run(range(3), max_epochs=4).epoch == 4
    assert engine.state.iteration == 12


def test_an_iteration_that_terminate_left_without_a_step_is_counted_once() -> None:
    engine = Engine(nothing)
    ask_at(engine, Events.ITERATION_STARTED, 2, engine.terminate)
    engine.run(range(3), max_epochs=2)
    seen = record(engine, Events.ITERATION_COMPLETED)
    engine.run(range(3), max_epochs=2)
    assert [iteration for _, _, iteration in seen] == [2, 3, 4, 5, 6]


def test_terminate_outside_a_run_changes_nothing() -> None:
    engine = Engine(nothing)
    engine.terminate()
    assert engine.run(range(3)).iteration == 3


def test_terminate_after_loading_does_not_move_the_place_to_resume_at() -> None:
    engine = Engine(nothing)
    engine.load_state_dict({"iteration": 4, "max_epochs": 2, "epoch_length": 3})
    engine.terminate()
    batches = batches_of(engine)
    engine.run(range(3))
    assert batches == [1, 2]


@pytest.mark.parametrize("event", EVERY_EVENT[1:-1])
def test_terminate_epoch_ends_the_epoch_after_the_event_it_is_called_in(event: Events) -> None:
    engine = Engine(nothing)
    seen = record(engine)
    ask_at(engine, event, 1, engine.terminate_epoch)
    engine.run(range(3), max_epochs=2)
    assert after(seen, event, 1)[:3] == ["TERMINATE_SINGLE_EPOCH", "EPOCH_COMPLETED", "EPOCH_STARTED"]
    assert engine.state.epoch == 2
    assert not engine.should_terminate_single_epoch


def test_the_epoch_after_one_that_was_cut_begins_the_data_anew_and_is_whole() -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate_epoch)
    engine.run(range(4), max_epochs=2)
    assert batches == [0, 1, 0, 1, 2, 3]


def test_terminate_epoch_in_the_step_ends_the_epoch_after_the_iteration() -> None:
    engine = Engine(lambda engine, batch: engine.terminate_epoch() if engine.state.iteration == 2 else None)
    batches = batches_of(engine)
    engine.run(range(3), max_epochs=2)
    assert batches == [0, 1, 0, 1, 2]


def test_terminate_epoch_can_leave_out_epoch_completed() -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.TERMINATE_SINGLE_EPOCH, Events.EPOCH_COMPLETED, Events.COMPLETED)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate_epoch(skip_epoch_completed=True)
    )
    engine.run(range(3), max_epochs=2)
    assert [name for name, _, _ in seen] == ["TERMINATE_SINGLE_EPOCH", "EPOCH_COMPLETED", "COMPLETED"]


def test_terminate_epoch_at_an_epochs_end_has_nothing_to_end() -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.TERMINATE_SINGLE_EPOCH)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), engine.terminate_epoch)
    assert engine.run(range(3), max_epochs=2).iteration == 6
    assert not seen


def test_the_saved_iteration_is_right_after_an_epoch_was_cut_before_a_step() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_STARTED(once=2), engine.terminate_epoch)
    seen: list[tuple[int, int]] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(after=2), lambda e: seen.append((e.state.iteration, e.state_dict()["iteration"]))
    )
    engine.run(range(3), max_epochs=2)
    assert seen == [(3, 3), (4, 4), (5, 5)]


@pytest.mark.parametrize(
    ("event", "count"), [(event, count) for event in EVERY_EVENT for count in (1, 2) if (event, count) != (STARTED, 2)]
)
def test_interrupt_suspends_the_run_and_run_goes_on_at_the_very_place(event: Events, count: int) -> None:
    plain, suspended = Engine(nothing), Engine(nothing)
    expected = record(plain), batches_of(plain)
    plain.run(range(3), max_epochs=2)
    seen, batches = record(suspended), batches_of(suspended)
    ask_at(suspended, event, count, suspended.interrupt)
    data = range(3)
    suspended.run(data, max_epochs=2)
    assert seen[-1][0] == "INTERRUPT"
    assert seen[-2][0] == event.name
    assert not suspended.should_interrupt
    suspended.run(data, max_epochs=2)
    seen.remove(next(entry for entry in seen if entry[0] == "INTERRUPT"))
    assert (seen, batches) == expected


def test_interrupt_in_the_step_suspends_after_the_iteration() -> None:
    engine = Engine(lambda engine, batch: engine.interrupt())
    places = [engine.run(range(2), max_epochs=2).iteration for _ in range(5)]
    assert places == [1, 2, 3, 4, 4]


def test_an_iterator_is_continued_after_interrupt() -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), engine.interrupt)
    data = iter(range(5))
    for _ in range(3):
        engine.run(data)
    assert batches == list(range(5))
    assert engine.state.epoch_length == 5


def test_other_data_given_to_a_suspended_run_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    engine.run(NoLength(4))
    engine.run(NoLength(7))
    assert batches == [0, 1, 2, 3]
    assert "set_data" in caplog.text


def test_a_suspended_run_can_be_given_more_epochs() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    engine.run(range(3), max_epochs=1)
    assert engine.run(max_epochs=3).iteration == 9


def test_a_suspended_run_begins_anew_when_its_maximum_is_set_to_none() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    engine.run(range(3), max_epochs=2)
    engine.state.max_epochs = None
    batches, seen = batches_of(engine), record(engine, Events.STARTED)
    engine.run(range(5), max_epochs=1)
    engine.run(max_epochs=1)
    assert seen == [("STARTED", 0, 0)]
    assert batches == [0, 1, 2, 3, 4]


def test_terminate_wins_over_interrupt() -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.INTERRUPT, Events.TERMINATE)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def both() -> None:
        engine.interrupt()
        engine.terminate()

    engine.run(range(3))
    assert [name for name, _, _ in seen] == ["TERMINATE"]


def test_interrupt_with_terminate_epoch_suspends_after_the_epochs_end() -> None:
    engine = Engine(nothing)
    seen = record(engine, Events.EPOCH_COMPLETED, Events.INTERRUPT)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def both() -> None:
        engine.interrupt()
        engine.terminate_epoch()

    engine.run(range(3), max_epochs=2)
    assert seen == [("EPOCH_COMPLETED", 1, 2), ("INTERRUPT", 1, 2)]


def test_set_data_keeps_the_length_of_the_present_epoch_and_no_other() -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: engine.set_data([10, 11]))
    state = engine.run(range(3), max_epochs=3)
    assert batches == [0, 1, 2, 0, 10, 11, 10, 11]
    assert state.epoch_length == 2
    assert state.dataloader == [10, 11]


def test_set_data_during_started_replaces_the_data_of_the_first_epoch() -> None:
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.add_event_handler(Events.STARTED, lambda: engine.set_data([7, 8, 9]))
    engine.run(range(3))
    assert batches == [7, 8, 9]


def test_new_data_is_told_the_epoch_it_joins_before_it_is_iterated() -> None:
    engine, told = Engine(nothing), Told(2)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: engine.set_data(told))
    engine.run(range(3), max_epochs=2)
    assert told.calls == ["set 1", "iter"]


def test_new_data_at_the_end_of_the_old_is_iterated_once() -> None:
    engine, told = Engine(nothing), Told(2)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda: engine.set_data(told))
    engine.run(range(3), epoch_length=5)
    assert told.calls == ["set 0", "iter"]


def test_a_skip_ends_with_its_iteration_also_where_the_run_was_suspended_in_it() -> None:
    weights: list[float] = []
    engine = Engine(lambda engine, batch: weights.append(engine.state.weight))

    @engine.on(Events.ITERATION_STARTED(once=1))
    def skip_and_suspend() -> None:
        engine.state.skip()
        engine.interrupt()

    engine.run(range(3))
    engine.run()
    assert weights == [0.0, 1.0, 1.0]
