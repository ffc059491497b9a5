"""Norms of gradients that lie in parts, on several meshes or whole, and the scaler over them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from allstep.errors import ArgumentError, ParallelError
from allstep.parallel import clip_gradient_norm, grad_scaler, gradient_norm
from allstep.testing import run_ranks
from allstep.world import World
from tests.parallel.sharded_training import whole

pytestmark = pytest.mark.slow


def gradients() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (1,), (4, 4), (7,)]  # (1,) leaves a rank without an element
    return [torch.randn(each, generator=draw, dtype=torch.float64) for each in shapes]


def of_several_meshes(world: World) -> list[Any]:
    assert world.mesh is not None
    placed = [(world.mesh["shard"], [Shard(0)]), (world.mesh["shard"], [Shard(0)])]
    placed += [(world.mesh, [Replicate(), Shard(1)]), (None, None)]
    found: list[Any] = []
    for norm_type in (2.0, 3.0, math.inf):
        parameters = []
        for gradient, (mesh, placements) in zip(gradients(), placed, strict=True):
            held = gradient if mesh is None else distribute_tensor(gradient, mesh, placements)
            parameters.append(nn.Parameter(torch.zeros_like(held)))
            parameters[-1].grad = held
        norm = world.clip_grad_norm_(parameters, 0.5, norm_type)
        assert not isinstance(norm, DTensor)
        found.append((norm, [whole(each.grad) for each in parameters]))
        if world.rank == 1:
            parameters[0].grad.to_local()[0] = torch.nan  # known to all ranks that hold a part of it
        found[-1] += (gradient_norm(parameters[:1], norm_type).isnan().item(),)
    return found


def test_the_norm_is_that_of_the_whole_gradient_over_several_meshes() -> None:
    ranks = run_ranks(of_several_meshes, 4, env={"ALLSTEP_MESH": "replicate=2,shard=2"})
    for norm_type, at in ((2.0, 0), (3.0, 1), (math.inf, 2)):
        parameters = [nn.Parameter(torch.zeros_like(each)) for each in gradients()]
        for parameter, gradient in zip(parameters, gradients(), strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5, norm_type)
        assert [each[at][2] for each in ranks] == [True, True, False, False]  # the other replica has no such gradient
        for found, clipped, _ in (each[at] for each in ranks):
            torch.testing.assert_close(found, norm, rtol=1e-12, atol=0)
            for mine, parameter in zip(clipped, parameters, strict=True):
                torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=0)


def test_gradients_that_are_whole_have_torchs_norm_to_the_last_bit() -> None:
    model = nn.Linear(3, 2)
    assert gradient_norm(model) == 0
    model(torch.ones(4, 3)).square().sum().backward()
    assert torch.equal(gradient_norm(model), torch.nn.utils.get_total_norm([each.grad for each in model.parameters()]))
    before = gradient_norm(model)
    assert torch.equal(clip_gradient_norm(model.parameters(), 0.1), before)
    torch.testing.assert_close(gradient_norm(model), torch.tensor(0.1))


def test_limits_and_norms_that_cannot_be_meant_are_refused() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ArgumentError, match="max_norm is -1"):
        clip_gradient_norm(model, -1)
    with pytest.raises(ArgumentError, match="norm_type is 0"):
        clip_gradient_norm(model, 1.0, 0)
    model.weight.grad = torch.full((1, 1), torch.nan)
    clip_gradient_norm(model, 1.0)
    with pytest.raises(ParallelError, match="norm of the gradients is nan"):
        clip_gradient_norm(model, 1.0, error_if_nonfinite=True)


def scaled(world: World, ignores: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    model = world.wrap(model, ignored=[model.bias] if ignores else [])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = grad_scaler("cpu", "fp16")
    states = []
    for iteration in range(3):
        before = torch.cat([whole(model.weight), whole(model.bias)[None]])
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        if iteration == 1 and world.rank == 1:
            model.weight.grad.to_local()[0, 0] = torch.inf  # in this rank's part, and in no other
        scaler.step(optimizer)
        scaler.update()
        weights = torch.cat([whole(model.weight), whole(model.bias)[None]])
        states.append((torch.equal(weights, before), scaler.get_scale()))
    other = grad_scaler("cpu", "fp16")
    other.load_state_dict(scaler.state_dict())
    return {"states": states, "round trip": other.state_dict() == scaler.state_dict(), "weights": weights}


def scaled_in_parts_and_with_one_whole(world: World) -> list[dict[str, Any]]:
    return [scaled(world, ignores) for ignores in (False, True)]


def test_an_infinity_on_one_rank_has_all_ranks_leave_out_the_step() -> None:
    first, second = run_ranks(scaled_in_parts_and_with_one_whole, 2, env={"ALLSTEP_MESH": "shard=2"})
    for each, other in zip(first, second, strict=True):
        assert torch.equal(each["weights"], other["weights"])
    for each in (*first, *second):
        assert each["states"] == [(False, 65536.0), (True, 32768.0), (False, 32768.0)]
        assert each["round trip"]


def scaled_on_several_meshes(world: World) -> list[Any]:
    """An infinity in a part that only one rank of one mesh has."""
    assert world.mesh is not None
    placed = [(world.mesh["shard"], [Shard(0)]), (world.mesh, [Shard(0), Shard(0)])]
    shapes = [(4, 3), (4,)]
    parameters = [
        nn.Parameter(distribute_tensor(torch.ones(shape), *place)) for shape, place in zip(shapes, placed, strict=True)
    ]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scaler = grad_scaler("cpu", "fp16")
    found = []
    for iteration in range(3):
        for each in parameters:
            each.grad = torch.ones_like(each) * scaler.scale(torch.ones(())).item()
        transposed = parameters[0].grad.to_local().t().contiguous().t()  # as of a layer whose weight is laid out so
        parameters[0].grad = DTensor.from_local(transposed, *placed[0])
        if iteration == 1 and world.rank == 3:
            parameters[1].grad.to_local()[0] = torch.inf
        if iteration != 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append(([whole(each).flatten()[0].item() for each in parameters], scaler.get_scale()))
    return found


def test_an_infinity_on_one_of_several_meshes_is_one_for_all_ranks() -> None:
    for found in run_ranks(scaled_on_several_meshes, 4, env={"ALLSTEP_MESH": "replicate=2,shard=2"}):
        assert found == [([0.0, 0.0], 65536.0), ([0.0, 0.0], 32768.0), ([-1.0, -1.0], 32768.0)]
