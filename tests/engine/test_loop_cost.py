"""What the loop does not do, told by counting: an event costs nothing until a handler of it is due."""

import sys
from types import FrameType
from typing import Any

import pytest

from allstep.engine import Engine, Events
from allstep.engine.registry import HandlerSlot
from tests.engine.recording import nothing


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """(event, count) of each time that an event's handlers were looked at."""
    seen: list[tuple[Any, int]] = []
    call = HandlerSlot.call

    def counting(self: HandlerSlot, engine: Any, count: int, event_args: tuple[Any, ...]) -> None:
        seen.append((self.event, count))
        call(self, engine, count, event_args)

    monkeypatch.setattr(HandlerSlot, "call", counting)
    return seen


def test_without_handlers_no_event_is_fired(calls: list[tuple[Any, int]]) -> None:
    Engine(nothing).run(range(50), max_epochs=3)
    assert calls == []


def test_a_filtered_handler_is_not_looked_at_between_its_due_counts(calls: list[tuple[Any, int]]) -> None:
    engine = Engine(nothing)
    for _ in range(10):
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=100), lambda: None)
    engine.add_event_handler(Events.ITERATION_STARTED(once=[7, 260]), lambda: None)
    engine.run(range(350))
    assert calls == [
        (Events.ITERATION_COMPLETED, 1),  # once at the start: 0 is a multiple of 100
        (Events.ITERATION_STARTED, 7),
        (Events.ITERATION_COMPLETED, 100),
        (Events.ITERATION_COMPLETED, 200),
        (Events.ITERATION_STARTED, 260),
        (Events.ITERATION_COMPLETED, 300),
    ]


def test_a_handler_that_is_never_due_again_is_not_looked_at(calls: list[tuple[Any, int]]) -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(before=3), lambda: None)
    engine.run(range(20))
    assert [count for _, count in calls] == [1, 2]


def test_an_event_whose_handlers_are_gone_is_not_fired(calls: list[tuple[Any, int]]) -> None:
    engine = Engine(nothing)
    with engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: None):
        pass
    engine.run(range(20))
    assert calls == []


def test_only_filtered_handlers_left_are_looked_at_when_they_are_due(calls: list[tuple[Any, int]]) -> None:
    engine = Engine(nothing)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=9), lambda: None)
    unfiltered = engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: unfiltered.remove())
    engine.run(range(20))
    assert [count for _, count in calls] == [1, 9, 18]


def test_inside_an_epoch_an_iteration_calls_nothing_of_the_engine() -> None:
    called: list[tuple[int, str]] = []
    engine = Engine(nothing)

    def note(frame: FrameType, event: str, _: object) -> None:
        if (
            event == "call"
            and "allstep/engine/" in frame.f_code.co_filename
            and "tests" not in frame.f_code.co_filename
        ):
            called.append((engine.state.iteration, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        engine.run(range(40), max_epochs=2)
    finally:
        sys.setprofile(None)
    assert {iteration for iteration, _ in called} == {0, 40, 80}  # only where an epoch begins or ends
