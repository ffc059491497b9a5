"""Requests among ranks: each holds on all of them at the same iteration, with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from allstep.engine import Engine, Events
from allstep.errors import DivergenceError
from allstep.testing import SimulatedRank, simulate
from tests.engine.simulated_data import Names, batches, raised_everywhere

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reason_of_a_stop_and_its_rank_are_known_on_every_rank(rank: int) -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, str | None, list[str]]:
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        seen: list[str] = []
        engine.add_event_handler(Events.TERMINATE, lambda: seen.append(str(engine.state.stop_reason)))

        @engine.on(Events.ITERATION_COMPLETED(once=5))
        def ask() -> None:
            if coordinator.rank == rank:
                engine.terminate(reason="the loss is NaN")

        state = engine.run(batches(100), max_epochs=3)
        return state.iteration, state.stop_reason, seen

    said = simulate(world, 3)
    assert said == [said[0]] * 3
    assert 5 <= said[0][0] < 100
    assert said[0][1:] == (f"rank {rank}: the loss is NaN", [f"rank {rank}: the loss is NaN"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_a_window_of_one_a_stop_holds_after_the_present_group(accumulate: int) -> None:
    def world(coordinator: SimulatedRank) -> int:
        engine = Engine(lambda e, b: None, coordinator=coordinator, accumulate=accumulate)

        @engine.on(Events.ITERATION_COMPLETED(once=7))
        def ask() -> None:
            if coordinator.rank == 1:
                engine.terminate()

        return engine.run(batches(40), window=1).iteration

    assert simulate(world, 2) == [-(-7 // accumulate) * accumulate] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_asked_for_at_an_epochs_end_holds_at_once(rank: int) -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, int]:
        engine = Engine(lambda e, b: None, coordinator=coordinator)

        @engine.on(Events.EPOCH_COMPLETED(once=2))
        def ask() -> None:
            if coordinator.rank == rank:
                engine.terminate()

        state = engine.run(batches(9), max_epochs=5)
        return state.epoch, state.iteration

    assert simulate(world, 2) == [(2, 18)] * 2


def test_an_epochs_end_asked_for_too_late_leaves_the_next_epoch_whole() -> None:
    def world(coordinator: SimulatedRank) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        engine = Engine(lambda e, b: seen.append((e.state.epoch, e.state.iteration)), coordinator=coordinator)

        @engine.on(Events.ITERATION_COMPLETED(once=4))
        def ask() -> None:
            if coordinator.rank == 0:
                engine.terminate_epoch()

        engine.run(batches(4), max_epochs=3)
        return seen

    assert simulate(world, 2) == [[(1 + at // 4, at + 1) for at in range(12)]] * 2


def test_a_stop_that_all_agree_on_holds_at_once() -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, str | None]:
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=6), lambda: engine.terminate(reason="done", agreed=True)
        )
        state = engine.run(batches(50))
        return state.iteration, (state.stop_reason or "").split(": ")[1]

    assert simulate(world, 3) == [(6, "done")] * 3


def test_a_plain_request_beside_an_agreed_stop_changes_nothing() -> None:
    def world(coordinator: SimulatedRank) -> int:
        engine = Engine(lambda e, b: None, coordinator=coordinator)

        @engine.on(Events.ITERATION_COMPLETED(once=6))
        def ask() -> None:
            engine.terminate(agreed=True)
            if coordinator.rank == 0:
                engine.terminate()

        iteration = engine.run(batches(50)).iteration
        assert coordinator.gather("after") == ["after", "after"]
        return iteration

    assert simulate(world, 2, timeout=30.0) == [6, 6]


@pytest.mark.parametrize("at", [(6, None, None), (None, 20, None), (6, 7, None), (6, 7, 8), (5, 6, 12)])
def test_an_agreed_stop_that_ranks_did_not_take_alike_is_an_error_on_all(at: tuple[int | None, ...]) -> None:
    def world(coordinator: SimulatedRank) -> None:
        engine = Engine(lambda e, b: None, coordinator=coordinator)

        @engine.on(Events.ITERATION_COMPLETED)
        def ask() -> None:
            if engine.state.iteration == at[coordinator.rank]:
                engine.terminate(agreed=True)

        engine.run(batches(50))

    messages = raised_everywhere(world, 3, DivergenceError)
    assert messages == [messages[0]] * 3
    first = next(rank for rank, iteration in enumerate(at) if iteration is not None)
    assert f"rank {first}: run end, epoch 1, iteration {at[first]}" in messages[0]
    assert "Alone()" in messages[0]


def test_ranks_that_end_together_for_different_reasons_are_together() -> None:
    def world(coordinator: SimulatedRank) -> int:
        engine = Engine(lambda e, b: None, coordinator=coordinator)

        @engine.on(Events.EPOCH_COMPLETED)
        def ask() -> None:
            if coordinator.rank == 0:
                engine.terminate(agreed=True)

        iteration = engine.run(batches(5)).iteration
        assert coordinator.gather(0) == [0, 0]
        return iteration

    assert simulate(world, 2, timeout=30.0) == [5, 5]


def test_a_handler_of_the_exception_ends_an_accumulating_run_of_one_rank() -> None:
    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == 3:
            raise RuntimeError("no")

    engine = Engine(step, accumulate=2)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda *_: engine.terminate())
    assert engine.run(batches(8)).iteration == 3
    asked_before = Engine(lambda e, b: e.terminate() if e.state.iteration < 3 else 1 / 0, accumulate=4)
    with pytest.raises(ZeroDivisionError):
        asked_before.run(batches(8))


def test_one_rank_may_replace_its_data_at_an_epochs_end() -> None:
    def world(coordinator: SimulatedRank) -> tuple[list[str], list[int]]:
        step = Names()
        engine = Engine(step, coordinator=coordinator)
        seen: list[str] = []
        for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.DATALOADER_STOP_ITERATION):
            engine.add_event_handler(event, lambda *_, event=event: seen.append(event.name))

        @engine.on(Events.EPOCH_COMPLETED(once=1))
        def replace() -> None:
            if coordinator.rank == 0:
                engine.set_data(batches(4, start=100))

        engine.run(batches(4), max_epochs=3)
        return seen, step.own

    (events, replaced), (others, kept) = simulate(world, 2, timeout=30.0)
    assert events == others
    assert replaced == [0, 1, 2, 3] + [100, 101, 102, 103] * 2
    assert kept == [0, 1, 2, 3] * 3


def test_of_two_replacements_in_one_window_the_later_is_taken() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        engine = Engine(step, coordinator=coordinator)

        @engine.on(Events.ITERATION_COMPLETED(before=4))
        def replace() -> None:
            if coordinator.rank == 1:
                engine.set_data(batches(30, start=100 * engine.state.iteration))

        engine.run(batches(20))
        return step.own

    untouched, replaced = simulate(world, 2, timeout=30.0)
    assert untouched == list(range(20))
    assert replaced[:3] == [0, 1, 2]
    assert replaced[-1] // 100 == 3
    assert len(replaced) == 20


def test_replacing_between_passes_keeps_the_batches_that_wait_for_their_group() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        engine = Engine(step, coordinator=coordinator, accumulate=4)

        @engine.on(Events.DATALOADER_STOP_ITERATION)
        def replace() -> None:
            if coordinator.rank == 0:
                engine.set_data(batches(10, start=100))

        engine.run(batches(6), epoch_length=12)
        return step.own

    replaced, kept = simulate(world, 2, timeout=30.0)
    assert replaced == [0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104, 105]
    assert kept == [0, 1, 2, 3, 4, 5] * 2


@pytest.mark.parametrize("other", ["interrupt", "terminate_epoch"])
def test_a_replacement_and_another_rank_s_request_may_land_together(other: str) -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, list[str]]:
        engine = Engine(Names(), coordinator=coordinator)
        seen: list[str] = []
        for event in Events:
            engine.add_event_handler(event, lambda *_, event=event: seen.append(event.name))

        @engine.on(Events.ITERATION_COMPLETED(once=4))
        def ask() -> None:
            if coordinator.rank == 0:
                engine.set_data(batches(30))
            elif coordinator.rank == 1:
                getattr(engine, other)()

        engine.run(batches(30), max_epochs=2, window=1)
        while seen[-1] == "INTERRUPT":
            engine.run()
        return engine.state.iteration, seen

    said = simulate(world, 3, timeout=30.0)
    assert said == [said[0]] * 3
    assert said[0][0] == (60 if other == "interrupt" else 34)
