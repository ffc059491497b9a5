"""Optimizers that were made before their model was put in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import allstep
from allstep.errors import ParallelError
from allstep.parallel.early_optimizers import parameters_before, watch_replaced


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_an_optimizer_from_before_the_wrap_raises_in_its_first_step() -> None:
    with allstep.init(device="cpu", mesh={"shard": 1}) as world:
        plain = model()
        early = torch.optim.AdamW(plain.parameters())
        wrapped = world.wrap(plain)
        wrapped(torch.ones(2, 4)).sum().backward()
        with pytest.raises(ParallelError, match=r"AdamW was made before world\.wrap .* steps 0\.weight"):
            early.step()
        torch.optim.AdamW(wrapped.parameters()).step()
        other = model()  # whose optimizer has nothing to do with it
        torch.optim.SGD(other.parameters()).step()
    early.step()  # nothing watches behind the World's end


@pytest.mark.parametrize("mesh", [None, {"shard": 1}, {"shard": 1, "tensor": 1}])
def test_a_script_that_makes_its_optimizer_behind_the_wrap_is_not_watched(mesh: dict[str, int] | None) -> None:
    with allstep.init(device="cpu", mesh=mesh) as world:
        plain = model()
        before = parameters_before(plain)
        wrapped = world.wrap(plain, tensor_plan={"0": "colwise", "1": "rowwise"})
        assert watch_replaced(before, wrapped.parameters()) is None


def test_where_parameters_stay_an_optimizer_may_be_made_before() -> None:
    with allstep.init(device="cpu") as world:
        plain = model()
        early = torch.optim.SGD(plain.parameters(), lr=1.0)
        world.wrap(plain)(torch.ones(2, 4)).sum().backward()
        early.step()
