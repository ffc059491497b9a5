"""What a rank reads ahead, and what it promises of its coming batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Sampler

from allstep.coordination import POLICIES, Uneven
from allstep.data import make_loader
from allstep.engine import Engine
from allstep.errors import DataError
from allstep.testing import SimulatedRank, simulate
from tests.engine.simulated_data import Counted, Lies, Stream, batches, raised_everywhere

pytestmark = pytest.mark.usefixtures("quiet")


def test_a_data_loader_over_an_iterable_data_set_is_read_ahead() -> None:
    def world(coordinator: SimulatedRank) -> tuple[int, int | None]:
        engine = Engine(lambda e, b: None, coordinator=coordinator)
        state = engine.run(DataLoader(Stream(10 + 6 * coordinator.rank), batch_size=2))
        return state.iteration, state.epoch_length

    assert simulate(world, 2) == [(5, 5)] * 2


def test_a_sampler_that_does_not_know_its_length_is_read_ahead() -> None:
    class Unsized(Sampler[int]):
        def __init__(self, n: int) -> None:
            self.n = n

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.n))

    def world(coordinator: SimulatedRank) -> int:
        data = Counted(20)
        loader = DataLoader(data, batch_size=2, sampler=Unsized(10 + 6 * coordinator.rank))
        return Engine(lambda e, b: None, coordinator=coordinator).run(loader).iteration

    assert simulate(world, 2) == [5, 5]


@pytest.mark.parametrize("own", [True, False])
def test_nothing_is_read_ahead_of_a_loader_whose_counts_are_arithmetic(own: bool) -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        data = Counted(40)
        loader: Any = DataLoader(data, batch_size=2)
        if own:
            loader = make_loader(data, rank=coordinator.rank, world_size=2, seed=0, batch_size=2)
        read: list[int] = []
        Engine(lambda e, b: read.append(data.read), coordinator=coordinator).run(loader, max_epochs=2)
        return read

    for read in simulate(world, 2):
        assert read == [2 * (at + 1) for at in range(len(read))]
        assert len(read) == (20 if own else 40)


@pytest.mark.parametrize(("lookahead", "most"), [(None, 32), (1, 1), (2, 2), (7, 7), (40, 40)])
def test_other_data_is_read_ahead_by_at_most_lookahead(lookahead: int | None, most: int) -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        data = Stream(200)
        ahead: list[int] = []
        engine = Engine(lambda e, b: ahead.append(data.read - e.state.iteration), coordinator=coordinator)
        engine.run(DataLoader(data, batch_size=None), lookahead=lookahead)
        return ahead

    for ahead in simulate(world, 2):
        assert len(ahead) == 200
        assert max(ahead) <= most
        assert max(ahead) > most // 2 - 1 or most == 1


def test_a_lookahead_smaller_than_a_group_is_refused() -> None:
    engine = Engine(lambda e, b: None, accumulate=4)
    with pytest.raises(ValueError, match=r"lookahead is 3; .* at least 4"):
        engine.run(batches(8), lookahead=3)
    assert engine.run(batches(8), lookahead=4).iteration == 8


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("given", [0, 2, 8, 9])
@pytest.mark.parametrize("terms", [{}, {"epoch_length": 25}, {"max_iters": 10}])
def test_data_that_gives_less_than_it_declared_is_one_error_on_all_ranks(
    policy: Uneven, given: int, terms: dict[str, int]
) -> None:
    def world(coordinator: SimulatedRank) -> None:
        lies = Lies(10, given if coordinator.rank == 1 else 10)
        loader = DataLoader(Counted(10), batch_size=1, sampler=lies)
        steps = Engine(lambda e, b: b.sum(), coordinator=coordinator)
        steps.run(loader, uneven=policy, **terms)

    messages = raised_everywhere(world, 3, DataError)
    assert messages == [messages[0]] * 3
    assert f"rank 1 declared 10 batches and gave {given}." in messages[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("length", [2, 3, 9, 13, 14])
def test_every_sample_of_the_own_loader_is_trained_once_whatever_its_tail(
    policy: Uneven, tokens: bool, length: int
) -> None:
    def world(coordinator: SimulatedRank) -> tuple[list[list[int]], int, list[float]]:
        loader = make_loader(Counted(length), rank=coordinator.rank, world_size=4, seed=0, batch_size=1, shuffle=True)
        seen: list[list[int]] = [[], []]
        weights: list[float] = []

        def step(engine: Engine, batch: torch.Tensor) -> None:
            weights.append(engine.state.weight)
            if engine.state.active:
                seen[engine.state.epoch - 1] += [int(x) for x in batch]

        engine = Engine(step, coordinator=coordinator, samples_in=len if tokens else None)
        state = engine.run(loader, max_epochs=2, uneven=policy)
        return seen, state.iteration, weights

    results = simulate(world, 4, timeout=30.0)
    iterations = -(-length // 4)
    for epoch in range(2):
        assert sorted(x for seen, _, _ in results for x in seen[epoch]) == list(range(length))
    assert {done for _, done, _ in results} == {2 * iterations}
    for at in range(2 * iterations):
        assert sum(weights[at] for _, _, weights in results) == pytest.approx(4.0)


@pytest.mark.parametrize("counted", [1.5, "three", -1, 1 << 40, None])
def test_samples_in_must_count(counted: Any) -> None:
    engine = Engine(lambda e, b: None, accumulate=2, samples_in=lambda batch: counted)
    with pytest.raises(DataError, match="samples_in returned"):
        engine.run(batches(4))


class CountsCopies(list[float]):
    """A batch that counts how often it is copied."""

    copies = 0

    def __copy__(self) -> CountsCopies:
        CountsCopies.copies += 1
        return CountsCopies(self)


def test_a_batch_is_kept_once_a_pass_and_not_for_each_vote() -> None:
    def copies(epochs: int, length: int) -> int:
        CountsCopies.copies = 0
        data = [CountsCopies([1.0, 2.0]) for _ in range(length)]
        Engine(lambda e, b: None, accumulate=2).run(data, max_epochs=epochs)
        return CountsCopies.copies

    once = copies(1, 4)
    assert once > 0
    assert copies(1, 40) == once
    assert copies(3, 40) == 3 * once
