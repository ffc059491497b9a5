"""What collectives and numbers say of a DTensor, in a world of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import allstep
from allstep.errors import AllstepError
from allstep.world import World


@pytest.fixture(scope="module")
def divided() -> Iterator[tuple[World, DTensor]]:
    with allstep.init(device="cpu", mesh={"shard": 1}) as world:
        yield world, distribute_tensor(torch.arange(4.0), world.mesh["shard"], [Shard(0)])


@pytest.mark.parametrize(
    "give",
    [World.all_reduce, World.all_gather, World.broadcast, lambda world, x: world.to_numbers({"x": x})],
    ids=["all_reduce", "all_gather", "broadcast", "to_numbers"],
)
def test_a_dtensor_is_refused_with_the_remedy(
    divided: tuple[World, DTensor], give: Callable[[World, Any], Any]
) -> None:
    with pytest.raises(AllstepError, match=r"DTensor.*full_tensor\(\)"):
        give(*divided)


def test_the_whole_of_a_dtensor_is_reduced(divided: tuple[World, DTensor]) -> None:
    world, parts = divided
    assert torch.equal(world.all_reduce(parts.full_tensor()), torch.arange(4.0))
