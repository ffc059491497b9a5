"""Passes over data among ranks: iterators lose nothing, groups go on across a pass, and what is left is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from allstep.engine import Engine, Events
from allstep.testing import SimulatedRank, simulate
from tests.engine.simulated_data import Counted, Names, Stream, batches

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("end", ["terminate_epoch", "interrupt", "terminate", "max_iters"])
def test_what_was_read_ahead_of_a_one_shot_iterator_is_given_later(end: str) -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        engine = Engine(step, coordinator=coordinator)
        stream = iter(batches(60))
        seen: list[str] = []
        engine.add_event_handler(Events.INTERRUPT, lambda: seen.append("INTERRUPT"))
        if end != "max_iters":

            @engine.on(Events.ITERATION_COMPLETED(once=13))
            def ask() -> None:
                if coordinator.rank == 1:
                    getattr(engine, end)()

        first = {"max_iters": 13} if end == "max_iters" else {"max_epochs": 1}
        engine.run(stream, epoch_length=20, **first)
        assert len(step.own) < 60
        assert bool(seen) == (end == "interrupt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if end == "max_iters":
                engine.run(max_iters=60)
            elif end == "interrupt":
                engine.run(max_epochs=3)
            else:
                engine.run(stream, max_epochs=5)
        return step.own

    assert simulate(world, 2, timeout=30.0) == [list(range(60))] * 2


def test_a_group_that_fails_gives_back_no_batch_of_an_earlier_group() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        data = iter(batches(6 if coordinator.rank == 0 else 2))
        names, fails = Names(), True

        def step(engine: Engine, batch: Any) -> None:
            if fails and engine.state.iteration == 3:
                raise ValueError("in the second group")
            names(engine, batch)

        engine = Engine(step, coordinator=coordinator, accumulate=2, uneven="longest")
        with pytest.raises(ValueError, match="second group"):
            engine.run(data, epoch_length=6)
        fails = False
        engine.run(data, epoch_length=6)
        return names.own

    assert simulate(world, 2, timeout=30.0) == [list(range(6)), [0, 1]]


def test_an_iterator_loses_nothing_where_other_ranks_data_begins_anew() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        data: Any = iter(batches(20)) if coordinator.rank == 0 else batches(5)
        Engine(step, coordinator=coordinator).run(data, epoch_length=4, max_epochs=5)
        return step.own

    assert simulate(world, 2, timeout=30.0) == [list(range(20)), [0, 1, 2, 3, 4] * 4]


def test_batches_that_wait_for_their_group_are_trained_when_iterators_run_dry() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        step = Names()
        engine = Engine(step, coordinator=coordinator, accumulate=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.run(iter(batches(8)), epoch_length=3, max_epochs=9)
        return step.own

    assert simulate(world, 2, timeout=30.0) == [list(range(8))] * 2


def test_a_length_is_learnt_with_a_short_group_when_max_iters_is_given() -> None:
    class Unknown:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(batches(6))

    def world(coordinator: SimulatedRank) -> tuple[int | None, list[bool]]:
        ends: list[bool] = []
        engine = Engine(lambda e, b: ends.append(e.state.group_end), coordinator=coordinator, accumulate=4)
        state = engine.run(Unknown(), max_iters=12)
        return state.epoch_length, ends

    assert simulate(world, 2) == [(6, [False, False, False, True, False, True] * 2)] * 2


@pytest.mark.parametrize("known", [True, False])
def test_what_was_left_unread_is_reported_over_all_passes_of_the_epoch(known: bool) -> None:
    def world(coordinator: SimulatedRank) -> list[tuple[int, int, int]]:
        n = [10, 7, 9][coordinator.rank]
        data: Any = DataLoader(Counted(2 * n), batch_size=2) if known else DataLoader(Stream(2 * n), batch_size=2)
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        state = engine.run(data, epoch_length=14)
        return [(each.rank, each.batches, each.samples) for each in state.unread]

    assert simulate(world, 3) == [[(0, 6, 12), (2, 4, 8)]] * 3


def test_batches_of_a_list_are_reported_exactly_however_many_were_left() -> None:
    def world(coordinator: SimulatedRank) -> list[tuple[int, int]]:
        state = Engine(lambda e, b: None, coordinator=coordinator).run(batches([40, 7][coordinator.rank]))
        return [(each.rank, each.batches) for each in state.unread]

    assert simulate(world, 2) == [[(0, 33)]] * 2


def test_nothing_is_reported_unread_that_the_next_epoch_reads() -> None:
    def world(coordinator: SimulatedRank) -> list[Any]:
        reports: list[Any] = []
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: reports.append(engine.state.unread))
        data = DataLoader(Counted([20, 10][coordinator.rank]), batch_size=1)
        engine.run(data, epoch_length=10, max_epochs=3, uneven="longest")
        return [*reports, engine.state.unread]

    assert simulate(world, 2) == [[(), (), (), ()]] * 2
