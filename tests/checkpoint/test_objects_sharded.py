"""Sharded modules and optimizers, saved and loaded at any world size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from allstep import Engine
from allstep.checkpoint import Checkpoint, PerRank
from allstep.errors import CheckpointError
from allstep.testing import run_ranks


def sharded(world, folder, steps, resumes):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoint = Checkpoint(folder, {"model": model, "optimizer": optimizer}, every=None)
    if resumes:
        checkpoint.resume()
    for step in range(*steps):
        optimizer.zero_grad()
        model(torch.full((2, 6), float(step))).pow(2).mean().backward()
        optimizer.step()
    checkpoint.save(Engine(lambda e, b: None), wait=True)
    return [each.full_tensor().detach() for each in model.parameters()]


@pytest.mark.slow
def test_sharded_modules_and_optimizers_resume_at_any_world_size(tmp_path):
    whole = run_ranks(sharded, 2, str(tmp_path / "whole"), (0, 4), False)[0]
    run_ranks(sharded, 2, str(tmp_path / "parts"), (0, 2), False)
    three = run_ranks(sharded, 3, str(tmp_path / "parts"), (2, 4), True)[0]
    for mine, expected in zip(three, whole, strict=True):
        torch.testing.assert_close(mine, expected)


def partly_used(world, folder, steps, shards):
    """Two groups, a frozen parameter, and one that never has a gradient and so has no state in the optimizer."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    model[1].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(7)))
    if shards:
        fully_shard(model)
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias, model[1].weight, model.unused]}]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    checkpoint = Checkpoint(folder, {"model": model, "optimizer": optimizer}, every=None, strict=True)
    checkpoint.resume()
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 3), step + 1.0)).pow(2).sum().backward()
        optimizer.step()
    if steps:
        checkpoint.save(Engine(lambda e, b: None), wait=True)

    def whole(tensor):
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()

    states = optimizer.state_dict()
    moments = {at: {key: whole(each) for key, each in state.items()} for at, state in states["state"].items()}
    return [whole(each) for each in model.parameters()], moments, [group["lr"] for group in states["param_groups"]]


@pytest.mark.slow
def test_a_sharded_optimizer_has_the_states_that_were_saved(tmp_path):
    folder = str(tmp_path)
    saved = run_ranks(partly_used, 2, folder, 2, True)[0]
    assert set(saved[1]) == {0, 1, 2}
    assert run_ranks(partly_used, 3, folder, 0, True) == [saved] * 3
    assert run_ranks(partly_used, 1, folder, 0, True) == [saved]


@pytest.mark.slow
def test_what_was_saved_sharded_loads_whole_and_the_other_way_round(tmp_path):
    folder = str(tmp_path)
    saved = run_ranks(partly_used, 2, folder, 1, True)[0]
    assert run_ranks(partly_used, 1, folder, 0, False) == [saved]
    whole = run_ranks(partly_used, 1, folder, 1, False)[0]
    assert run_ranks(partly_used, 2, folder, 0, True) == [whole] * 2


def save_sharded_by_rank(world, folder):
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(3, 4)
    fully_shard(model)
    checkpoint = Checkpoint(folder, {"own": PerRank(model)}, every=None, strict=True)
    with pytest.raises(CheckpointError, match="own/weight is sharded over ranks"):
        checkpoint.save(Engine(lambda e, b: None), wait=True)


@pytest.mark.slow
def test_sharded_tensors_are_not_one_ranks_own(tmp_path):
    run_ranks(save_sharded_by_rank, 2, str(tmp_path))


def keep_flat_shards(world, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel(nn.Linear(3, 4), device_id=torch.device("cpu"))
    said = r"'model' is or holds a FullyShardedDataParallel.*fully_shard instead"
    for model in (flat, nn.Sequential(flat)):
        with pytest.raises(CheckpointError, match=said):
            Checkpoint(folder, {"model": model})


@pytest.mark.slow
def test_modules_sharded_by_fsdp1_are_refused_with_what_to_use_instead(tmp_path):
    run_ranks(keep_flat_shards, 2, str(tmp_path))
