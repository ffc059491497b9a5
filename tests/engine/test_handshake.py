"""What ranks compare before a run begins."""

from __future__ import annotations

from typing import Any

import pytest

from allstep.engine import Engine
from allstep.errors import TermsError
from allstep.testing import SimulatedRank
from tests.engine.simulated_data import batches, raised_everywhere

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(
    ("key", "mine", "theirs"),
    [
        ("max_epochs", {"max_epochs": 2}, {"max_epochs": 3}),
        ("max_iters", {"max_iters": 5}, {"max_iters": 6}),
        ("uneven", {"uneven": "longest"}, {"uneven": "error"}),
        ("window", {"window": 1}, {}),
        ("window", {"window": 0}, {}),
        ("uneven", {"uneven": "sometimes"}, {}),
        ("lookahead", {"lookahead": -1}, {}),
        ("lookahead", {"lookahead": 8}, {}),
        ("epoch_length", {"epoch_length": 3}, {}),
        ("accumulate", {"engine": {"accumulate": 2}}, {}),
        ("idle", {"engine": {"idle": "skip"}}, {}),
        ("the engine's name", {"engine": {"name": "a"}}, {"engine": {"name": "b"}}),
    ],
)
def test_ranks_about_to_run_different_things_raise_the_same_error(
    key: str, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    def world(coordinator: SimulatedRank) -> None:
        terms = dict(mine if coordinator.rank == 1 else theirs)
        options = terms.pop("engine", {})
        Engine(lambda e, b: None, coordinator=coordinator, **options).run(batches(10), **terms)

    messages = raised_everywhere(world, 3, TermsError)
    assert messages == [messages[0]] * 3
    value = next(iter({**mine, **mine.get("engine", {})}.values()))
    value = next(iter(value.values())) if isinstance(value, dict) else value
    assert f"{key} is rank 0: " in messages[0]
    assert f"rank 1: {value!r}" in messages[0]


def test_what_cannot_be_meant_and_all_ranks_say_is_an_error_about_the_argument() -> None:
    def world(coordinator: SimulatedRank) -> None:
        Engine(lambda e, b: None, coordinator=coordinator).run(batches(3), window=0)

    assert raised_everywhere(world, 2, ValueError) == ["window is 0; it must be an int of at least 1"] * 2


def test_the_engine_s_name_is_by_default_its_step_s() -> None:
    def one(engine: Engine, batch: Any) -> None: ...
    def other(engine: Engine, batch: Any) -> None: ...

    def world(coordinator: SimulatedRank) -> None:
        Engine(other if coordinator.rank else one, coordinator=coordinator).run(batches(3))

    message = raised_everywhere(world, 2, TermsError)[0]
    assert "one'" in message
    assert "other'" in message
