from typing import Any

import pytest

from allstep.engine import Engine, Events
from allstep.errors import EngineError
from tests.engine.recording import NoLength, batches_of, nothing, record

EVERYWHERE = [
    Events.STARTED,
    Events.EPOCH_STARTED,
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    Events.EPOCH_COMPLETED,
    Events.COMPLETED,
]


class FailOnce:
    """A callable that raises when it is called for the `count`-th time, and never again."""

    def __init__(self, count: int = 1, error: type[BaseException] = ZeroDivisionError) -> None:
        self.left = count
        self.error = error

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_of_the_step_propagates(error: type[BaseException]) -> None:
    fail = FailOnce(2, error)
    engine = Engine(lambda engine, batch: fail())
    with pytest.raises(error):
        engine.run(range(3))
    assert engine.state.iteration == 2


@pytest.mark.parametrize("event", EVERYWHERE)
def test_an_exception_of_a_handler_propagates_and_the_run_can_be_finished(event: Events) -> None:
    engine = Engine(nothing)
    engine.add_event_handler(event, FailOnce(1))
    with pytest.raises(ZeroDivisionError):
        engine.run(range(3), max_epochs=2)
    batches = batches_of(engine)
    state = engine.run(range(3), max_epochs=2)
    assert (state.iteration, state.epoch) == (6, 2)
    done_before = {Events.ITERATION_COMPLETED: 1, Events.EPOCH_COMPLETED: 3, Events.COMPLETED: 0}.get(event, 0)
    assert batches == ([0, 1, 2] * 2)[done_before:]


def test_an_exception_of_the_data_propagates() -> None:
    def data() -> Any:
        yield 0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Engine(nothing).run(data())


def test_handlers_of_exception_raised_are_given_the_exception() -> None:
    error = ZeroDivisionError("here")

    def step(engine: Engine, batch: Any) -> None:
        raise error

    engine = Engine(step)
    given: list[Any] = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda e, error: given.append((e, error)))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: given.append(error))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda: given.append("none"))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda e, error, a: given.append((error, a)), 3)
    with pytest.raises(ZeroDivisionError, match="here"):
        engine.run(range(3))
    assert given == [(engine, error), error, "none", (error, 3)]


def test_a_handler_of_exception_raised_does_not_swallow_the_exception() -> None:
    engine = Engine(lambda engine, batch: 1 / 0)
    seen = record(engine)
    with pytest.raises(ZeroDivisionError):
        engine.run(range(3))
    assert [name for name, _, _ in seen[-2:]] == ["ITERATION_STARTED", "EXCEPTION_RAISED"]


def test_a_handler_of_exception_raised_may_raise_another() -> None:
    engine = Engine(lambda engine, batch: 1 / 0)

    @engine.on(Events.EXCEPTION_RAISED)
    def translate(error: BaseException) -> None:
        raise KeyError("instead") from error

    with pytest.raises(KeyError, match="instead"):
        engine.run(range(3))


def test_terminate_in_a_handler_of_exception_raised_ends_the_run_well() -> None:
    engine = Engine(lambda engine, batch: 1 / 0 if batch == 1 else None)
    seen = record(engine)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: engine.terminate())
    engine.run(range(3), max_epochs=2)
    assert [name for name, _, _ in seen[-3:]] == ["EXCEPTION_RAISED", "TERMINATE", "COMPLETED"]


def test_a_request_made_before_the_exception_does_not_swallow_it() -> None:
    def step(engine: Engine, batch: Any) -> None:
        engine.terminate()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Engine(step).run(range(3))


@pytest.mark.parametrize("data", [range(4), NoLength(4)])
def test_the_engine_runs_again_and_redoes_the_failed_iteration(data: Any) -> None:
    fail = FailOnce(6)
    engine = Engine(lambda engine, batch: fail())
    batches = batches_of(engine)
    with pytest.raises(ZeroDivisionError):
        engine.run(data, max_epochs=2)
    assert engine.state_dict()["iteration"] == 5
    seen = record(engine, Events.ITERATION_COMPLETED)
    state = engine.run(data, max_epochs=2)
    assert batches == [0, 1, 2, 3] * 2
    assert seen == [("ITERATION_COMPLETED", 2, n) for n in (6, 7, 8)]
    assert (state.iteration, state.epoch) == (8, 2)


def test_terminate_after_a_failed_run_does_not_leave_out_the_rest_of_its_epoch() -> None:
    fail = FailOnce(2)
    engine = Engine(lambda engine, batch: fail())
    with pytest.raises(ZeroDivisionError):
        engine.run(range(3), max_epochs=2)
    engine.terminate()
    batches = batches_of(engine)
    engine.run(range(3), max_epochs=2)
    assert batches == [1, 2, 0, 1, 2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_iterator_that_failed_in_a_step_gives_that_batch_again(accumulate: int) -> None:
    fail, data = FailOnce(2), iter(range(4))
    engine = Engine(lambda engine, batch: fail(), accumulate=accumulate)
    batches = batches_of(engine)
    with pytest.raises(ZeroDivisionError):
        engine.run(data)
    engine.run(data)
    assert batches == [0] * (accumulate - 1) + [0, 1, 2, 3]  # an accumulation group is begun again


@pytest.mark.parametrize("event", [Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED])
def test_a_batch_of_an_iterator_that_no_step_had_is_given_again(event: Events) -> None:
    data = iter(range(4))
    engine = Engine(nothing)
    batches = batches_of(engine)
    engine.add_event_handler(event(once=1), FailOnce(1))
    with pytest.raises(ZeroDivisionError):
        engine.run(data)
    with engine.add_event_handler(Events.ITERATION_STARTED(once=3), engine.terminate):
        engine.run(data)
    engine.run(data)
    assert batches == [0, 1, 2, 3]


def test_a_failure_after_an_epochs_last_step_leaves_only_the_epochs_end_to_do() -> None:
    engine = Engine(nothing)
    ends = FailOnce(3)
    engine.add_event_handler(Events.ITERATION_COMPLETED, ends)
    with pytest.raises(ZeroDivisionError):
        engine.run(range(3), max_epochs=2)
    seen = record(engine, Events.EPOCH_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED)
    engine.run(range(3), max_epochs=2)
    assert seen == [
        ("EPOCH_STARTED", 1, 3),
        ("EPOCH_COMPLETED", 1, 3),
        ("EPOCH_STARTED", 2, 3),
        *[("ITERATION_COMPLETED", 2, n) for n in (4, 5, 6)],
        ("EPOCH_COMPLETED", 2, 6),
    ]


def test_stop_iteration_in_the_step_is_an_error_and_not_the_end_of_data() -> None:
    engine = Engine(lambda engine, batch: next(iter(())))
    with pytest.raises(EngineError, match="StopIteration") as caught:
        engine.run(range(3))
    assert isinstance(caught.value.__cause__, StopIteration)
    assert engine.state.epoch_length == 3


@pytest.mark.parametrize("event", EVERYWHERE)
@pytest.mark.parametrize("data", [range(3), NoLength(3)])
def test_stop_iteration_in_a_handler_is_an_error(event: Events, data: Any) -> None:
    engine = Engine(nothing)
    engine.add_event_handler(event, FailOnce(1, StopIteration))
    with pytest.raises(EngineError, match="StopIteration"):
        engine.run(data)


def test_stop_iteration_while_counting_samples_is_an_error() -> None:
    engine = Engine(nothing, accumulate=2, samples_in=lambda batch: next(iter(())))
    with pytest.raises(ValueError, match="samples_in raised StopIteration"):
        engine.run(range(4))


def test_keyboard_interrupt_reaches_handlers_of_exception_raised() -> None:
    fail = FailOnce(1, KeyboardInterrupt)
    engine = Engine(lambda engine, batch: fail())
    given: list[type[BaseException]] = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda e, error: given.append(type(error)))
    with pytest.raises(KeyboardInterrupt):
        engine.run(range(2))
    assert given == [KeyboardInterrupt]


def test_the_exception_and_where_the_run_stood_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    fail = FailOnce(2)
    with pytest.raises(ZeroDivisionError):
        Engine(lambda engine, batch: fail()).run(range(3))
    assert "iteration 2: ZeroDivisionError" in caplog.text
