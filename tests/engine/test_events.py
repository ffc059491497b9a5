from enum import Enum
from typing import Any

import numpy as np
import pytest

from allstep.engine import Engine, EventEnum, Events, EventsList
from tests.engine.recording import nothing


class Backward(EventEnum):
    STARTED = "backward_started"
    COMPLETED = "backward_completed"


def due_iterations(event: Any, iterations: int = 12) -> list[int]:
    engine = Engine(nothing)
    due: list[int] = []
    engine.add_event_handler(event, lambda e: due.append(e.state.iteration))
    engine.run(range(iterations))
    return due


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"every": 1}, list(range(1, 13))),
        ({"every": 5}, [5, 10]),
        ({"every": 13}, []),
        ({"once": 3}, [3]),
        ({"once": [7, 2, 2]}, [2, 7]),
        ({"once": (4,)}, [4]),
        ({"before": 4}, [1, 2, 3]),
        ({"before": 0}, []),
        ({"after": 9}, [10, 11, 12]),
        ({"after": 0}, list(range(1, 13))),
        ({"before": 7, "after": 4}, [5, 6]),
        ({"every": 3, "after": 4}, [5, 8, 11]),
        ({"every": 3, "before": 8}, [1, 4, 7]),
        ({"every": 2, "before": 9, "after": 4}, [5, 7]),
        ({"event_filter": lambda engine, count: count in (1, 6)}, [1, 6]),
        ({"every": np.int64(6)}, [6, 12]),
    ],
)
def test_a_filter_lets_through(filters: dict[str, Any], expected: list[int]) -> None:
    assert due_iterations(Events.ITERATION_COMPLETED(**filters)) == expected


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Events.GET_BATCH_STARTED, [0, 2, 4]),
        (Events.GET_BATCH_COMPLETED, [0, 2, 4]),
        (Events.ITERATION_STARTED, [2, 4]),
        (Events.ITERATION_COMPLETED, [2, 4]),
    ],
)
def test_iteration_events_are_filtered_by_the_iteration(event: Events, expected: list[int]) -> None:
    assert due_iterations(event(every=2), 5) == expected


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.EPOCH_COMPLETED])
def test_epoch_events_are_filtered_by_the_epoch(event: Events) -> None:
    engine = Engine(nothing)
    due: list[int] = []
    engine.add_event_handler(event(every=2), lambda: due.append(engine.state.epoch))
    engine.run(range(3), max_epochs=5)
    assert due == [2, 4]


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"every": 2, "once": 3},
        {"once": 3, "before": 3},
        {"event_filter": lambda e, n: True, "every": 2},
        {"event_filter": lambda e, n: True, "once": 2},
        {"event_filter": lambda e, n: True, "after": 2},
    ],
)
def test_filters_that_cannot_be_combined_are_refused(filters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only every can be combined"):
        Events.ITERATION_STARTED(**filters)


@pytest.mark.parametrize(
    "filters",
    [
        {"every": 0},
        {"every": -1},
        {"every": 1.5},
        {"every": True},
        {"once": 0},
        {"once": []},
        {"once": [1, 0]},
        {"once": 2.0},
        {"before": -1},
        {"after": -1},
        {"every": 0, "after": 3},
    ],
)
def test_a_number_out_of_range_is_refused_with_its_name_and_value(filters: dict[str, Any]) -> None:
    name, value = next(iter(filters.items()))
    with pytest.raises(ValueError, match=name) as caught:
        Events.ITERATION_STARTED(**filters)
    assert repr(value) in str(caught.value)


def test_an_event_filter_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="event_filter is 3"):
        Events.STARTED(event_filter=3)  # type: ignore[arg-type]


def test_an_event_filter_that_cannot_take_engine_and_count_is_refused() -> None:
    with pytest.raises(ValueError, match="called with \\(engine, count\\)"):
        Events.STARTED(event_filter=lambda count: True)  # type: ignore[arg-type,misc]


def test_an_event_filter_is_given_the_engine_and_the_count() -> None:
    engine = Engine(nothing)
    given: list[tuple[Any, int]] = []
    engine.add_event_handler(
        Events.EPOCH_COMPLETED(event_filter=lambda *arguments: bool(given.append(arguments))), lambda: None
    )
    engine.run(range(2), max_epochs=2)
    assert given == [(engine, 1), (engine, 2)]


def test_every_one_is_the_event_itself() -> None:
    assert Events.STARTED(every=1) is Events.STARTED


def test_joining_events_changes_no_operand() -> None:
    two = Events.STARTED | Events.COMPLETED
    three = two | Events.EPOCH_STARTED(every=2)
    four = two | three
    assert list(two) == [Events.STARTED, Events.COMPLETED]
    assert len(three) == 3
    assert len(four) == 5
    assert three[2] == Events.EPOCH_STARTED(every=2)


@pytest.mark.parametrize("first", [Events.STARTED, Events.STARTED(once=1), EventsList()])
def test_joining_an_event_with_something_else_is_refused(first: Any) -> None:
    with pytest.raises(TypeError, match="derive your events from EventEnum"):
        first | "started"


def test_a_handler_on_joined_events_is_called_for_each_with_its_filter() -> None:
    engine = Engine(nothing)
    due: list[Any] = []
    events = Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED | Events.ITERATION_COMPLETED(once=3)
    engine.add_event_handler(events, lambda: due.append(engine.last_event_name))
    engine.run(range(4))
    assert [event.name for event in due] == [*["ITERATION_COMPLETED"] * 3, "EPOCH_COMPLETED"]


def test_a_custom_event_is_unknown_until_registered() -> None:
    engine = Engine(nothing)
    assert not engine.has_registered_events(Backward.STARTED)
    for use in (
        lambda: engine.add_event_handler(Backward.STARTED, lambda: None),
        lambda: engine.fire_event(Backward.STARTED),
        lambda: engine.fire_event("no such event"),
    ):
        with pytest.raises(ValueError, match="register_events"):
            use()


def test_custom_events_belong_to_one_engine() -> None:
    one, other = Engine(nothing), Engine(nothing)
    one.register_events(*Backward, "text", event_to_attr={Backward.STARTED: "passes"})
    assert one.has_registered_events(Backward.COMPLETED)
    assert one.has_registered_events("text")
    assert not other.has_registered_events(Backward.COMPLETED)
    assert not hasattr(other.state, "passes")


def test_a_custom_event_fired_in_the_step_calls_its_handlers() -> None:
    def step(engine: Engine, batch: int) -> None:
        engine.fire_event(Backward.STARTED)
        engine.fire_event("text")

    engine = Engine(step)
    engine.register_events(*Backward, "text")
    seen: list[tuple[str, int]] = []
    engine.add_event_handler(Backward.STARTED, lambda e: seen.append(("enum", e.state.iteration)))
    engine.add_event_handler("text", lambda e: seen.append(("text", e.state.iteration)))
    engine.run(range(2))
    assert seen == [("enum", 1), ("text", 1), ("enum", 2), ("text", 2)]


def test_a_custom_event_is_filtered_by_the_state_attribute_it_was_given() -> None:
    def step(engine: Engine, batch: int) -> None:
        for _ in range(2):
            engine.state.passes += 1  # type: ignore[attr-defined]
            engine.fire_event(Backward.COMPLETED)

    engine = Engine(step)
    engine.register_events(*Backward, event_to_attr={Backward.COMPLETED: "passes"})
    assert engine.state.passes == 0  # type: ignore[attr-defined]
    due: list[int] = []
    engine.add_event_handler(Backward.COMPLETED(every=3), lambda e: due.append(e.state.passes))
    engine.run(range(4))
    assert due == [3, 6]


def test_registering_again_with_event_to_attr_makes_the_event_counted() -> None:
    engine = Engine(nothing)
    engine.register_events(*Backward)
    with pytest.raises(ValueError, match="not counted"):
        engine.add_event_handler(Backward.STARTED(every=2), lambda: None)
    engine.register_events(*Backward, event_to_attr={Backward.STARTED: "passes"})
    engine.add_event_handler(Backward.STARTED(every=2), lambda: None)


@pytest.mark.parametrize("event", [Events.TERMINATE, Events.INTERRUPT, Events.DATALOADER_STOP_ITERATION])
def test_a_filter_on_an_event_that_is_not_counted_is_refused(event: Events) -> None:
    with pytest.raises(ValueError, match="not counted"):
        Engine(nothing).add_event_handler(event(every=2), lambda: None)


def test_only_event_enums_and_strings_can_be_registered() -> None:
    class Plain(Enum):
        A = "a"

    engine = Engine(nothing)
    with pytest.raises(TypeError, match="is not an event"):
        engine.register_events(Plain.A)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="event_to_attr"):
        engine.register_events("a", event_to_attr=["a"])  # type: ignore[arg-type]


def test_a_built_in_event_can_be_fired_by_hand_also_with_a_filter_on_it() -> None:
    engine = Engine(nothing)
    fired: list[int] = []
    engine.add_event_handler(Events.COMPLETED, lambda: fired.append(1))
    engine.fire_event(Events.COMPLETED)
    engine.fire_event(Events.COMPLETED(every=2))  # type: ignore[arg-type]
    assert fired == [1, 1]


def test_members_of_different_enumerations_are_different_events() -> None:
    engine = Engine(nothing)
    engine.register_events(*Backward)
    fired: list[str] = []
    engine.add_event_handler(Events.STARTED, lambda: fired.append("engine"))
    engine.add_event_handler(Backward.STARTED, lambda: fired.append("backward"))
    engine.run(range(1))
    assert fired == ["engine"]


def test_an_event_is_equal_to_another_librarys_of_its_name_and_value_only() -> None:
    foreign = Enum("Events", {"STARTED": "started", "COMPLETED": "other"})
    elsewhere = Enum("Signals", {"STARTED": "started"})
    assert foreign["STARTED"] == Events.STARTED
    assert foreign["STARTED"] == Events.STARTED
    assert foreign["COMPLETED"] != Events.COMPLETED
    assert elsewhere["STARTED"] != Events.STARTED
    assert Events.STARTED != "STARTED"
