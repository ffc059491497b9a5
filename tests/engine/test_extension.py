"""What handlers leave with an engine for checkpoints, by name, and what they learn of its run."""

from __future__ import annotations

from collections import Counter

from allstep.engine import Engine, Events
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
