"""The garbage collector runs at the same iterations everywhere, and is left as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from allstep import Alone, Engine, Events
from allstep.handlers import GarbageCollection
from allstep.testing import run_ranks
from allstep.world import World
from tests.engine.recording import nothing


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    was_enabled = gc.isenabled()
    yield
    (gc.enable if was_enabled else gc.disable)()


class Watch:
    """The iterations in which the collector ran, and of which generation."""

    def __init__(self, trainer: Engine) -> None:
        self.seen: list[tuple[int, int]] = []
        self._trainer = trainer

    def __enter__(self) -> Watch:
        gc.callbacks.append(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self.seen.append((self._trainer.state.iteration, info["generation"]))


def make_cycles(engine: Engine, batch: object) -> None:
    for _ in range(2000):  # more than what starts a collection by itself
        cycle: list[Any] = []
        cycle.append(cycle)


def test_it_runs_each_so_many_iterations_and_never_by_itself() -> None:
    trainer = Engine(make_cycles, coordinator=Alone())
    GarbageCollection(5, generation=1).attach(trainer)
    gc.enable()
    with Watch(trainer) as watch:
        trainer.run([0] * 12)
        during = [each for each in watch.seen if each[0] in range(12)]
    assert during == [(0, 2), (5, 1), (10, 1)]
    assert gc.isenabled()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_after_an_exception_it_is_as_it_was(was_enabled: bool) -> None:
    trainer = Engine(lambda engine, batch: 1 / 0, coordinator=Alone())
    GarbageCollection().attach(trainer)
    (gc.enable if was_enabled else gc.disable)()
    with pytest.raises(ZeroDivisionError):
        trainer.run([0])
    assert gc.isenabled() == was_enabled


def test_after_an_end_without_completed_it_is_as_it_was() -> None:
    trainer = Engine(nothing, coordinator=Alone())
    GarbageCollection().attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: trainer.terminate(skip_completed=True))
    gc.enable()
    trainer.run([0] * 5)
    assert gc.isenabled()


def _collections(world: World) -> list[tuple[int, int]]:
    trainer = Engine(lambda engine, batch: [make_cycles(engine, batch) for _ in range(1 + 3 * world.rank)])
    GarbageCollection(4).attach(trainer)
    gc.enable()
    with Watch(trainer) as watch:
        trainer.run([0] * 10)
        return [each for each in watch.seen if 0 < each[0] < 10]


@pytest.mark.slow
def test_ranks_collect_at_the_same_iterations() -> None:
    assert run_ranks(_collections, 2) == [[(4, 2), (8, 2)]] * 2


@pytest.mark.parametrize(("options", "text"), [({"every": 0}, "every is 0"), ({"generation": 3}, "generation is 3")])
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GarbageCollection(**options)
