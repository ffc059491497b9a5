import gc
import weakref
from functools import partial
from typing import Any

import pytest

from allstep import Alone, State
from allstep.engine import Engine, Events, FilteredEvent
from allstep.engine.registry import Registry
from tests.engine.recording import nothing


class Callable2:
    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, engine: Engine, *more: Any) -> None:
        self.given.append((engine, *more))

    def method(self, engine: Engine) -> None:
        self.given.append((engine,))


def test_a_handler_is_given_the_engine_if_it_has_a_place_for_it() -> None:
    engine = Engine(nothing)
    given: list[Any] = []
    engine.add_event_handler(Events.STARTED, lambda e: given.append(e))
    engine.add_event_handler(Events.STARTED, lambda: given.append("none"))
    engine.add_event_handler(Events.STARTED, lambda *args: given.append(args))
    engine.add_event_handler(Events.STARTED, lambda e=None: given.append(e))
    engine.run(range(1))
    assert given == [engine, "none", (engine,), engine]


def test_positional_and_keyword_arguments_are_kept_with_and_without_the_engine() -> None:
    engine = Engine(nothing)
    given: list[Any] = []
    engine.add_event_handler(Events.STARTED, lambda e, a, b=0: given.append((e, a, b)), 1, b=2)
    engine.add_event_handler(Events.STARTED, lambda a, *, b: given.append((a, b)), 3, b=4)
    engine.on(Events.STARTED, 5)(lambda e, a: given.append((e, a)))
    engine.run(range(1))
    assert given == [(engine, 1, 2), (3, 4), (engine, 5)]


def test_methods_partials_and_callable_objects_can_be_handlers() -> None:
    engine = Engine(nothing)
    target = Callable2()
    engine.add_event_handler(Events.STARTED, target, 7)
    engine.add_event_handler(Events.STARTED, target.method)
    engine.add_event_handler(Events.STARTED, partial(target, engine, 8))
    engine.run(range(1))
    assert target.given == [(engine, 7), (engine,), (engine, 8, engine)]


def test_a_builtin_is_called_with_the_engine() -> None:
    engine = Engine(nothing)
    seen: list[Any] = []
    engine.add_event_handler(Events.STARTED, seen.append)
    engine.run(range(1))
    assert seen == [engine]


def test_a_handler_that_cannot_take_the_call_is_refused_with_both_signatures() -> None:
    def wants_three(engine: Engine, a: int, b: int) -> None: ...

    with pytest.raises(ValueError, match="wants_three") as caught:
        Engine(nothing).add_event_handler(Events.STARTED, wants_three, 1, c=2)
    message = str(caught.value)
    assert "engine: allstep.engine.engine.Engine, a: int, b: int" in message
    assert "(engine, 1, c=2)" in message


def test_a_refused_handler_is_not_added() -> None:
    engine = Engine(nothing)

    def wants_two(a: int, b: int) -> None: ...

    with pytest.raises(ValueError, match="wants_two"):
        engine.add_event_handler(Events.STARTED, wants_two)
    assert not engine.has_event_handler(wants_two)


def test_something_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="must be callable"):
        Engine(nothing).add_event_handler(Events.STARTED, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [lambda batch: None, lambda engine, batch, more: None])
def test_a_step_that_cannot_take_engine_and_batch_is_refused(step: Any) -> None:
    with pytest.raises(ValueError, match="called with \\(engine, batch\\)"):
        Engine(step)


def test_a_step_that_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="process_function is None"):
        Engine(None)  # type: ignore[arg-type]


def test_handlers_with_and_without_filters_are_called_in_the_order_added() -> None:
    engine = Engine(nothing)
    order: list[str] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: order.append("every"))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: order.append("plain"))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: order.append("once"))
    engine.run(range(2))
    assert order == ["plain", "every", "plain", "once"]


def test_one_handler_can_be_added_twice_and_is_called_twice() -> None:
    engine = Engine(nothing)
    calls: list[int] = []

    def handler() -> None:
        calls.append(1)

    engine.add_event_handler(Events.STARTED, handler)
    engine.add_event_handler(Events.STARTED, handler)
    engine.run(range(1))
    assert len(calls) == 2


def test_the_decorator_gives_the_function_back() -> None:
    engine = Engine(nothing)

    def handler() -> None: ...

    assert engine.on(Events.STARTED)(handler) is handler
    assert engine.has_event_handler(handler, Events.STARTED)


def test_has_event_handler_looks_at_one_event_or_at_all() -> None:
    engine = Engine(nothing)

    def handler() -> None: ...

    engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)
    assert engine.has_event_handler(handler)
    assert engine.has_event_handler(handler, Events.ITERATION_COMPLETED)
    assert engine.has_event_handler(handler, Events.STARTED | Events.ITERATION_COMPLETED)
    assert not engine.has_event_handler(handler, Events.STARTED)
    assert not engine.has_event_handler(handler, "an event that nobody registered")
    assert not engine.has_event_handler(nothing)


def test_a_removed_handler_is_not_called() -> None:
    engine = Engine(nothing)
    calls: list[int] = []

    def handler() -> None:
        calls.append(engine.state.iteration)

    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.run(range(2))
    engine.remove_event_handler(handler, Events.ITERATION_COMPLETED)
    engine.run(range(2))
    assert calls == [1, 2]
    with pytest.raises(ValueError, match="not a handler of"):
        engine.remove_event_handler(handler, Events.ITERATION_COMPLETED)


def test_filtered_handlers_stay_when_the_unfiltered_one_is_removed() -> None:
    engine = Engine(nothing)
    calls: list[int] = []

    def plain() -> None: ...

    engine.add_event_handler(Events.ITERATION_COMPLETED, plain)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda e: calls.append(e.state.iteration))
    engine.remove_event_handler(plain, Events.ITERATION_COMPLETED)
    engine.run(range(5))
    assert calls == [2, 4]


def test_a_handle_removes_the_handler_from_all_its_events_and_can_do_so_twice() -> None:
    engine = Engine(nothing)

    def handler() -> None: ...

    handle = engine.add_event_handler(Events.STARTED | Events.EPOCH_COMPLETED(every=2), handler)
    engine.remove_event_handler(handler, Events.STARTED)
    handle.remove()
    handle.remove()
    assert not engine.has_event_handler(handler)


def test_a_handle_as_a_context_manager_removes_its_handler() -> None:
    engine = Engine(nothing)

    def handler() -> None: ...

    def fail_with_the_handler() -> None:
        with engine.add_event_handler(Events.STARTED, handler) as handle:
            assert engine.has_event_handler(handler)
            assert handle is not None
            raise KeyError

    with pytest.raises(KeyError):
        fail_with_the_handler()
    assert not engine.has_event_handler(handler)


def test_a_handler_added_while_its_event_fires_is_called_in_the_same_firing() -> None:
    engine = Engine(nothing)
    calls: list[str] = []

    def late() -> None:
        calls.append("late")

    def adds() -> None:
        calls.append("adds")
        engine.add_event_handler(Events.STARTED, late)

    engine.add_event_handler(Events.STARTED, adds)
    engine.run(range(1))
    assert calls == ["adds", "late"]


def test_a_handler_removed_while_its_event_fires_is_called_for_the_last_time() -> None:
    engine = Engine(nothing)
    calls: list[int] = []

    def removed() -> None:
        calls.append(engine.state.iteration)

    def removes() -> None:
        if engine.has_event_handler(removed):
            engine.remove_event_handler(removed, Events.ITERATION_COMPLETED)

    engine.add_event_handler(Events.ITERATION_COMPLETED, removes)
    engine.add_event_handler(Events.ITERATION_COMPLETED, removed)
    engine.run(range(3))
    assert calls == [1]


def test_a_handler_that_removes_itself_is_called_once() -> None:
    engine = Engine(nothing)
    calls: list[int] = []

    def once() -> None:
        calls.append(engine.state.iteration)
        handle.remove()

    handle = engine.add_event_handler(Events.ITERATION_STARTED, once)
    engine.run(range(3))
    assert calls == [1]


@pytest.mark.parametrize("event", [Events.ITERATION_STARTED, Events.GET_BATCH_STARTED, Events.ITERATION_COMPLETED])
def test_a_handler_added_in_the_middle_of_a_run_is_called_from_then_on(event: Events) -> None:
    engine = Engine(nothing)
    calls: list[int] = []

    def add() -> None:
        engine.add_event_handler(event(every=2), lambda e: calls.append(e.state.iteration))

    engine.add_event_handler(Events.ITERATION_STARTED(once=3), add)
    engine.run(range(7))
    assert calls == [4, 6]


def test_a_handler_of_terminate_single_epoch_may_take_the_iterations_done() -> None:
    engine = Engine(nothing)
    given: list[Any] = []
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda e, iter_counter: given.append((e, iter_counter)))
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda iter_counter: given.append(iter_counter))
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda e: given.append(e))
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda: given.append("none"))
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda e, n, a, k: given.append((n, a, k)), "a", k="k")
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), engine.terminate_epoch)
    engine.run(range(3), max_epochs=2)
    assert given == [(engine, 2), 2, engine, "none", (2, "a", "k")]


class Watching(Engine):
    def __init__(self) -> None:
        super().__init__(nothing)
        self.names: list[str] = []

    def _fire_event(self, event: Any, *event_args: Any) -> None:
        self.names.append(event.name)
        super()._fire_event(event, *event_args)


def test_a_subclass_that_overrides_the_firing_is_given_every_event() -> None:
    engine = Watching()
    engine.run(range(1), epoch_length=2)
    assert engine.names == [
        "STARTED",
        "EPOCH_STARTED",
        *["GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"],
        "OPTIMIZER_STEP_COMPLETED",
        *["GET_BATCH_STARTED", "DATALOADER_STOP_ITERATION"],
        *["GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED", "OPTIMIZER_STEP_COMPLETED"],
        "EPOCH_COMPLETED",
        "COMPLETED",
    ]


def test_a_subclass_that_overrides_the_firing_still_has_its_handlers_filtered() -> None:
    engine = Watching()
    calls: list[int] = []
    handle = engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda e: calls.append(e.state.iteration))
    engine.run(range(5))
    handle.remove()
    engine.names.clear()
    engine.run(range(5))
    assert calls == [2, 4]
    assert engine.names.count("ITERATION_COMPLETED") == 5


def test_an_engine_nobody_holds_is_freed_at_once_although_it_has_handlers() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.STARTED, lambda e: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda e, a: None, 1)
    engine.run(range(3))
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(engine)
        del engine
        assert gone() is None
    finally:
        gc.enable()


def test_the_name_of_the_event_being_fired_is_known_in_its_handler() -> None:
    engine = Engine(nothing)
    names: list[Any] = []
    engine.add_event_handler(Events.STARTED | Events.COMPLETED, lambda: names.append(engine.last_event_name))
    engine.run(range(1))
    assert names == [Events.STARTED, Events.COMPLETED]


def test_handlers_of_optimizer_steps_cost_other_iterations_nothing() -> None:
    state = State()
    registry = Registry(state)
    registry.add(Events.OPTIMIZER_STEP_COMPLETED(every=50), lambda: None)
    completed = registry.slots[Events.ITERATION_COMPLETED]
    state.iteration = 1
    registry.schedule()
    assert completed.due == 50
    state.iteration, state.inner_iterations = 60, 40  # 20 steps, in groups of 3
    registry.schedule()
    assert completed.due == 90
    registry.add(Events.OPTIMIZER_STEP_COMPLETED(once=21), lambda: None)
    assert completed.due == 61


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("when", [{"every": 4}, {"once": [2, 7]}, {"every": 3, "after": 4}, {"before": 3}])
def test_they_are_called_after_each_step_for_which_they_wait(accumulate: int, when: dict[str, Any]) -> None:
    engine = Engine(nothing, coordinator=Alone(), accumulate=accumulate)
    called: list[tuple[int, int]] = []
    event = Events.OPTIMIZER_STEP_COMPLETED(**when)
    engine.add_event_handler(event, lambda: called.append((engine.state.optimizer_steps, engine.state.iteration)))
    engine.run(range(8), max_epochs=3)
    ends = [at for at in range(1, 25) if at % 8 == 0 or (at % 8) % accumulate == 0]
    assert isinstance(event, FilteredEvent)
    assert called == [(step, at) for step, at in enumerate(ends, 1) if event.filter.matches(engine, step)]
    assert called
