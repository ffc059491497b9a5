"""The default lookahead grows while the batches that ranks hold take few bytes; it is the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import IterableDataset

from allstep.engine import Engine
from allstep.engine.batch_sizes import bytes_of
from allstep.testing import SimulatedRank, simulate

pytestmark = pytest.mark.usefixtures("quiet")

MEBIBYTE = 2**20


def sized(mebibytes: float) -> torch.Tensor:
    """A batch of two samples that counts as so large and takes no memory."""
    return torch.zeros((), dtype=torch.uint8).expand(2, int(mebibytes * MEBIBYTE) // 2)


class Sizes(IterableDataset[torch.Tensor]):
    """Batches of given sizes in MiB; nobody knows how many."""

    def __init__(self, *runs: tuple[int, float]) -> None:
        self.runs = runs
        self.read = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for count, mebibytes in self.runs:
            for _ in range(count):
                self.read += 1
                yield sized(mebibytes)


class Seen(NamedTuple):
    ahead: list[int]
    windows: list[int]


def run(coordinator: SimulatedRank, data: Sizes, **terms: Any) -> Seen:
    """For each iteration the batches read and not run, and the length of each window."""
    ahead: list[int] = []
    ends: list[int] = [0]

    def step(engine: Engine, batch: torch.Tensor) -> None:
        ahead.append(data.read - engine.state.iteration)
        if engine.extension.window_ends_at != ends[-1]:
            ends.append(engine.extension.window_ends_at)

    Engine(step, coordinator=coordinator).run(data, **terms)
    return Seen(ahead, [end - begin for begin, end in pairwise(ends)])


def test_windows_of_small_batches_double_up_to_half_of_the_most() -> None:
    for seen in simulate(lambda rank: run(rank, Sizes((100, 0.001))), 2):
        assert seen.windows[:6] == [1, 2, 4, 8, 16, 16]
        assert max(seen.ahead) == 32


def test_reading_ahead_begins_as_with_a_lookahead_of_four_and_grows() -> None:
    small = simulate(lambda rank: run(rank, Sizes((100, 0.001)), lookahead=4), 2)
    for seen, bounded in zip(simulate(lambda rank: run(rank, Sizes((100, 0.001))), 2), small, strict=True):
        assert seen.ahead[0] == bounded.ahead[0] == 3
        assert all(ahead <= 3 * (at + 1) for at, ahead in enumerate(seen.ahead))


@pytest.mark.parametrize(("mebibytes", "most"), [(1.9, 32), (2.5, 16), (5.0, 8), (9.0, 4), (40.0, 4)])
def test_what_is_held_stays_below_64_megabytes_or_at_four_batches(mebibytes: float, most: int) -> None:
    for seen in simulate(lambda rank: run(rank, Sizes((80, mebibytes))), 2):
        assert max(seen.ahead) == most
        assert max(seen.windows) == most // 2


def test_all_ranks_go_as_far_as_the_one_with_the_largest_batches() -> None:
    sizes = [0.001, 5.0, 2.5]
    ranks = simulate(lambda rank: run(rank, Sizes((80, sizes[rank.rank]))), 3)
    assert {tuple(seen.windows) for seen in ranks} == {tuple(ranks[0].windows)}
    assert [max(seen.ahead) for seen in ranks] == [8, 8, 8]


def test_batches_that_become_large_shorten_the_windows_again() -> None:
    for seen in simulate(lambda rank: run(rank, Sizes((80, 0.001), (80, 40.0))), 2):
        assert max(seen.windows) == 16
        assert seen.windows[-3:-1] == [2, 2]  # the last one ends where the data does
        assert max(seen.ahead[-40:]) <= 4


@pytest.mark.parametrize("lookahead", [2, 4, 12])
def test_an_explicit_lookahead_is_exact_however_small_the_batches(lookahead: int) -> None:
    for seen in simulate(lambda rank: run(rank, Sizes((80, 0.001)), lookahead=lookahead), 2):
        assert max(seen.ahead) == lookahead


def test_a_window_that_was_asked_for_bounds_the_growth() -> None:
    for seen in simulate(lambda rank: run(rank, Sizes((80, 0.001)), window=3), 2):
        assert max(seen.windows) == 3


class Opaque:
    """Nobody can tell how large it is."""

    def __len__(self) -> int:
        return 2


def test_batches_whose_size_nobody_can_tell_stay_at_four() -> None:
    def world(coordinator: SimulatedRank) -> list[int]:
        read: list[int] = []
        ahead: list[int] = []

        def batches() -> Iterator[Opaque]:
            for at in range(60):
                read.append(at)
                yield Opaque()

        engine = Engine(
            lambda e, b: ahead.append(len(read) - e.state.iteration), coordinator=coordinator, samples_in=len
        )
        engine.run(batches())
        return ahead

    assert [max(ahead) for ahead in simulate(world, 2)] == [4, 4]


class Resumable(Sizes):
    """Data with a state of its own, of so many MiB."""

    def __init__(self, mebibytes: float) -> None:
        super().__init__((80, 0.001))
        self.mebibytes = mebibytes

    def state_dict(self) -> dict[str, Any]:
        return {"shuffled": torch.zeros(int(self.mebibytes * MEBIBYTE), dtype=torch.uint8), "read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


def test_a_state_that_the_data_keeps_for_each_batch_counts_too() -> None:
    small = simulate(lambda rank: run(rank, Resumable(0.01)), 2)
    large = simulate(lambda rank: run(rank, Resumable(9.0)), 2)
    assert [max(seen.ahead) for seen in small] == [32, 32]
    assert [max(seen.ahead) for seen in large] == [4, 4]


def test_the_bytes_of_nested_batches_are_counted() -> None:
    tensor = torch.zeros(3, 4)
    assert bytes_of(tensor) == 48
    assert bytes_of(tensor.numpy()) == 48
    assert bytes_of({"x": (tensor, [tensor, None]), "text": "four"}) == 48 + 48 + 8 + 4
    assert bytes_of([tensor] * 1000) == 48_000
    assert bytes_of([]) == 0
    assert bytes_of({"x": object()}) == float("inf")
