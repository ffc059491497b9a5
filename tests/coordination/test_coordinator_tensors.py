"""Tensors through a coordinator: alone, over simulated ranks, and over a process group."""

from __future__ import annotations

import pytest
import torch

from allstep import Alone
from allstep.coordination import Coordinator
from allstep.errors import SimulationError
from allstep.testing import run_ranks, simulate
from allstep.world import World, internals


def exchanged(coordinator: Coordinator) -> tuple[list[list[int]], list[list[float]], list[float]]:
    own = torch.tensor([coordinator.rank, 7], dtype=torch.uint8)
    values = torch.tensor([1.0, -float(coordinator.rank)], dtype=torch.float64)
    reduced = [coordinator.reduce_tensor(values, op).tolist() for op in ("sum", "max", "min")]  # type: ignore[arg-type]
    return coordinator.gather_bytes(own).tolist(), reduced, values.tolist()


def expected(ranks: int, rank: int) -> tuple[list[list[int]], list[list[float]], list[float]]:
    last = ranks - 1
    reduced = [[float(ranks), -float(sum(range(ranks)))], [1.0, 0.0], [1.0, -float(last)]]
    return [[each, 7] for each in range(ranks)], reduced, [1.0, -float(rank)]


def test_alone_what_is_given_comes_back() -> None:
    assert exchanged(Alone()) == expected(1, 0)


def test_simulated_ranks_are_given_every_ranks_bytes_and_leave_their_own() -> None:
    assert simulate(exchanged, 3) == [expected(3, rank) for rank in range(3)]


def test_bytes_of_different_sizes_raise_in_a_simulation() -> None:
    with pytest.raises(SimulationError, match="different sizes"):
        simulate(lambda c: c.gather_bytes(torch.zeros(1 + c.rank, dtype=torch.uint8)), 2)


def over_a_group(world: World) -> tuple[list[list[int]], list[list[float]], list[float]]:
    return exchanged(internals(world).coordinator)


@pytest.mark.slow
def test_real_ranks_are_given_every_ranks_bytes() -> None:
    assert run_ranks(over_a_group, 3) == [expected(3, rank) for rank in range(3)]
