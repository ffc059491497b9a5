"""What handlers leave with an engine for checkpoints, by name, and what they learn of its run."""

from __future__ import annotations

from collections import Counter

import pytest

from allstep.engine import Engine, Events, State
from tests.engine.recording import nothing


class Counting(Counter[str]):
    def state_dict(self) -> dict[str, int]:
        return dict(self)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.update(state_dict)


def test_states_are_named_by_class_and_order() -> None:
    extension = Engine(lambda engine, batch: None).extension
    first, second, named = Counting(), Counting(), Counting()
    assert [extension.add_state(first), extension.add_state(second)] == ["Counting", "Counting 2"]
    assert extension.add_state(named, "words") == "words"
    assert extension.add_state(first) == "Counting"
    assert list(extension.states.values()) == [first, second, named]
    assert extension.states["Counting 2"] is second


def test_a_state_that_is_removed_is_not_saved_and_others_keep_their_names() -> None:
    extension = Engine(lambda engine, batch: None).extension
    first, second = Counting(), Counting()
    extension.add_state(first)
    extension.add_state(second)
    extension.remove_state(first)
    assert list(extension.states) == ["Counting 2"]
    assert extension.states["Counting 2"] is second


def test_a_run_inside_another_is_nested() -> None:
    outer, inner = Engine(nothing), Engine(nothing)
    seen: list[bool] = []
    inner.add_event_handler(Events.COMPLETED, lambda: seen.append(inner.extension.is_nested))
    outer.add_event_handler(Events.EPOCH_COMPLETED, lambda: inner.run([0]))
    outer.run([0])
    inner.run([0])
    assert seen == [True, False]


def test_a_run_goes_on_with_the_next_epoch_after_what_its_owner_lets_pass() -> None:
    engine, heard = Engine(lambda engine, batch: 1 / batch), []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: heard.append(error))
    engine.extension.survive(lambda error: isinstance(error, ZeroDivisionError))
    state = engine.run([1, 0, 1], max_epochs=2)
    assert (state.epoch, state.iteration, len(heard)) == (2, 4, 2)


def test_an_exception_between_iterations_that_is_survived_ends_the_run() -> None:
    engine, heard = Engine(lambda engine, batch: None), []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: 1 / 0)
    engine.add_event_handler(Events.COMPLETED, lambda: heard.append("completed"))
    engine.extension.survive(lambda error: True)
    assert engine.run([1, 2], max_epochs=2).epoch == 1
    assert heard == []


def test_what_is_not_survived_leaves_the_run_and_is_told_once() -> None:
    engine, heard = Engine(lambda engine, batch: 1 / batch), []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: heard.append(error))
    engine.extension.survive(lambda error: False)
    with pytest.raises(ZeroDivisionError):
        engine.run([1, 0])
    assert len(heard) == 1


def test_a_state_that_replaces_another_says_where_the_run_stands() -> None:
    class Replaceable(Engine):
        @property
        def state(self) -> State:  # type: ignore[override]
            return self.extension.state

        @state.setter
        def state(self, state: State) -> None:
            pass  # the constructor's own

    seen: list[int] = []
    engine = Replaceable(lambda engine, batch: seen.append(batch))
    state = State(iteration=4, epoch=2, epoch_length=3, max_epochs=2)
    engine.extension.replace_state(state)
    assert engine.run(range(3)) is engine.state
    assert engine.extension.state is state
    assert seen == [1, 2]


def test_an_epoch_that_is_ended_is_not_gone_on_with() -> None:
    seen: list[int] = []
    engine = Engine(lambda engine, batch: seen.append(batch))
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate())
    engine.run(range(3), max_epochs=2)
    engine.extension.end_epoch()
    engine.run(range(3), max_epochs=2)
    assert seen == [0, 1, 0, 1, 2]
