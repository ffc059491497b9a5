"""The judge of the situations tells values apart and starts the ranks that it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from allstep import World
from tests.situations.judge import Judge, is_same


def seed_and_draw(world: World, key: str) -> dict[str, Any]:
    return {key: world.seed, "random": float(torch.rand(()))}


def size_and_rank(world: World) -> tuple[int, int]:
    return world.world_size, world.rank


def rank_of(world: World) -> int:
    return world.rank


def test_the_function_is_called_with_seed_0_and_its_arguments(same_at_every_world_size: Judge) -> None:
    random = float(torch.rand((), generator=torch.Generator().manual_seed(0)))
    same_at_every_world_size(seed_and_draw, {"seed": 0, "random": random}, "seed")


def test_the_function_is_called_on_so_many_ranks(same_at_every_world_size: Judge) -> None:
    for size in (1, 3):
        same_at_every_world_size(size_and_rank, [(size, rank) for rank in range(size)], join=list, world_sizes=[size])


def test_a_rank_with_another_value_fails_the_test(same_at_every_world_size: Judge) -> None:
    with pytest.raises(AssertionError, match="rank 1 returned 1, rank 0 0"):
        same_at_every_world_size(rank_of, 0)


def test_ranks_can_be_joined_before_they_are_compared(same_at_every_world_size: Judge) -> None:
    same_at_every_world_size(rank_of, 0, join=min)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (1.0 + 1e-7, 1.0),
        (math.nan, math.nan),
        ([{"a": torch.tensor([1.0])}], [{"a": torch.tensor([1.0])}]),
        ((1, "x"), [1, "x"]),
        (np.arange(2), np.arange(2)),
    ],
)
def test_values_are_the_same(found: Any, expected: Any) -> None:
    assert is_same(found, expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (1.001, 1.0),
        (None, 1.0),
        ("1", 1),
        ([1, 2], [1, 2, 3]),
        ({"a": 1}, {"b": 1}),
        (1.0, math.nan),
        ([1.0], torch.tensor([1.0])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    ],
)
def test_values_are_told_apart(found: Any, expected: Any) -> None:
    assert not is_same(found, expected)
