"""What a module's state is called, and whose buffers are kept, however its parts are wrapped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from allstep import Engine
from allstep.checkpoint import Checkpoint
from allstep.checkpoint.objects import ModuleAdapter
from allstep.testing import run_ranks


class Nets(nn.Module):
    """Two wrapped parts and one that is not."""

    def __init__(self, world, model):
        super().__init__()
        self.back = world.wrap(model)
        self.critic = world.wrap(copy.deepcopy(model))
        self.head = nn.Linear(4, 2)


def build(world, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    wrapped = world.wrap(model)
    if kind == "averaged":
        return AveragedModel(wrapped)
    return Nets(world, model) if kind == "container" else wrapped


def save_parts(world, folder, kind):
    module = build(world, kind)
    with torch.no_grad():
        for each in module.parameters():
            each.add_(1)
    Checkpoint(folder, {"module": module}, every=None, strict=True).save(Engine(lambda e, b: None), wait=True)
    return [each.tolist() for each in module.parameters()]


def load_parts(world, folder, kind):
    module = build(world, kind)
    loaded = Checkpoint(folder, {"module": module}, every=None).resume()
    assert not any(".module." in name.removeprefix("module.") for name in loaded.state["module"])
    return [each.tolist() for each in module.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["averaged", "container"])
def test_wrapped_parts_load_at_a_world_size_that_does_not_wrap_them(kind, tmp_path):
    folder = str(tmp_path)
    saved = run_ranks(save_parts, 2, folder, kind)[0]
    for world_size in (1, 2):
        assert run_ranks(load_parts, world_size, folder, kind) == [saved] * world_size


def test_compiled_parts_have_the_names_of_their_modules():
    part = nn.Linear(2, 2)
    module = nn.Sequential(torch.compile(part), nn.Linear(2, 2))
    state = ModuleAdapter(module).states()[0]
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert set(state._metadata) == {"", "0", "1"}
    other = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))
    ModuleAdapter(other).load(state, [None], 0)
    assert torch.equal(other[0].weight, part.weight)


class Counting(nn.Module):
    """Several buffers, in which ranks differ."""

    def __init__(self, rank):
        super().__init__()
        for at in range(6):
            self.register_buffer(f"b{at}", torch.full((at + 1,), float(rank)))
        self.weight = nn.Parameter(torch.zeros(1))


def save_buffers(world, folder):
    module = Counting(10 + world.rank)
    Checkpoint(folder, {"m": module}, every=None, strict=True).save(Engine(lambda e, b: None), wait=True)


def load_buffers(world, folder):
    module = Counting(0)
    loaded = Checkpoint(folder, {"m": module}, every=None).resume()
    common = {float(value[0]) for name, value in loaded.state["m"].items() if name != "weight"}
    return common, {float(each[0]) for each in module.buffers()}


@pytest.mark.slow
def test_buffers_that_nobody_broadcasts_are_each_ranks_own_and_never_a_mix(tmp_path):
    run_ranks(save_buffers, 2, str(tmp_path))
    assert run_ranks(load_buffers, 3, str(tmp_path)) == [({10.0}, {10.0}), ({10.0}, {11.0}), ({10.0}, {10.0})]
    assert run_ranks(load_buffers, 1, str(tmp_path)) == [({10.0}, {10.0})]


def save_without_wrapper(world, folder):
    """The module that was wrapped is saved, and not its wrapper."""
    module = Counting(10 + world.rank)
    wrapped = world.wrap(module)
    with torch.no_grad():
        for each in module.buffers():
            each.fill_(20 + world.rank)  # as a forward pass on this rank's batch does
    checkpoint = Checkpoint(folder, {"m": module}, every=None, strict=True)
    checkpoint.save(Engine(lambda e, b: None), wait=True)
    del wrapped
    loaded = checkpoint.store.load(checkpoint.store.choose())
    return loaded.per_rank[world.rank]["objects"]


@pytest.mark.slow
def test_buffers_that_ddp_broadcasts_are_rank_0s_without_the_wrapper_too(tmp_path):
    assert run_ranks(save_without_wrapper, 2, str(tmp_path)) == [{}, {}]
    assert run_ranks(load_buffers, 2, str(tmp_path)) == [({20.0}, {20.0})] * 2
