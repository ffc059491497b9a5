"""What the loop does not do, told by counting: an event costs nothing until a handler of it is due."""

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


def test_the_loop_leaves_its_course_alone_until_an_epoch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from allstep.engine.loop import RunLoop

    looked: list[int] = []
    is_over = RunLoop._epoch_is_over

    def counting(self: RunLoop) -> bool:
        looked.append(engine.state.iteration)
        return is_over(self)

    monkeypatch.setattr(RunLoop, "_epoch_is_over", counting)
    engine = Engine(nothing)
    engine.run(range(40), max_epochs=2)
    assert looked == [0, 40, 40, 80]
