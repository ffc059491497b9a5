"""A bucket layout that is settled when a module is wrapped: the same sums after a resume, and no trace."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.parallel import buckets
from allstep.testing import run_ranks

pytestmark = pytest.mark.slow


def layered() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 700), nn.ReLU(), nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 10))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, rank: int, first: int, stop: int) -> None:
    for i in range(first, stop):
        generator = torch.Generator().manual_seed(1000 * rank + i)
        x = torch.randn(16, 64, generator=generator)
        y = torch.randint(0, 10, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


def resumed_equals_unbroken(world, deterministic):
    def fresh():
        model = world.wrap(layered(), deterministic=deterministic, bucket_cap_mb=1)
        return model, torch.optim.Adam(model.parameters(), lr=1e-2)

    model, optimizer = fresh()
    train(model, optimizer, world.rank, 0, 4)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, world.rank, 4, 9)
    again, its_optimizer = fresh()
    again.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    train(again, its_optimizer, world.rank, 4, 9)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_resumed_run_adds_gradients_in_the_order_of_the_unbroken_one(ranks):
    assert all(run_ranks(resumed_equals_unbroken, ranks, True))


def test_without_it_three_ranks_part():
    assert not all(run_ranks(resumed_equals_unbroken, 3, False))


class Mixed(nn.Module):
    """Tied parameters, two dtypes, a frozen layer, buffers that a forward pass changes, dropout, hooks that count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.narrow = nn.Linear(8, 8).to(torch.bfloat16)
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.calls = 0
        for module in (self, self.norm):
            module.register_forward_pre_hook(lambda *_: self.count())
            module.register_full_backward_hook(lambda *_: self.count())

    def count(self) -> None:
        self.calls += 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(self.embed(tokens)))
        x = self.narrow(self.frozen(x).to(torch.bfloat16)).to(torch.float32)
        return self.head(x) * self.phase.abs().sum()


def traces_of_wrapping(world):
    torch.manual_seed(world.rank)
    module = Mixed()
    module.eval()
    module.drop.train()
    before_buffers = copy.deepcopy(dict(module.named_buffers()))
    modes = [each.training for each in module.modules()]
    wants = [p.requires_grad for p in module.parameters()]
    kept = torch.full_like(module.narrow.weight, 3)
    module.narrow.weight.grad = kept
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with torch.no_grad():
        wrapped = world.wrap(module, init_sync=False)
    facts = {
        "rebuilt": wrapped._has_rebuilt_buckets,
        "calls": module.calls == 0,
        "buffers": all(torch.equal(b, before_buffers[n]) for n, b in module.named_buffers()),
        "modes": modes == [each.training for each in module.modules()],
        "wants": wants == [p.requires_grad for p in module.parameters()],
        "kept": bool((module.narrow.weight.grad == 3).all()),
        "grads": all(p.grad is None for p in module.parameters() if p is not module.narrow.weight),
        "drawn": (random.getstate(), np.random.get_state()[1].tolist()) == drawn[:2]
        and torch.equal(torch.get_rng_state(), drawn[2]),
        "own module": wrapped.module is module and "forward" not in vars(module),
    }
    module.narrow.weight.grad = None
    module.train()
    for _ in range(3):
        wrapped(torch.arange(20)).sum().backward()
    return facts


def test_it_leaves_no_trace_in_module_gradients_and_generators():
    for facts in run_ranks(traces_of_wrapping, 2):
        assert all(facts.values()), facts


def trains_with(world, options):
    model = world.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), **options)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
    return isinstance(model, DistributedDataParallel)


@pytest.mark.parametrize(
    "options",
    [
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": False},
        {"bucket_cap_mb": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ddp_trains_with_every_option(options):
    assert all(run_ranks(trains_with, 2, options))


def trains_sparse_embeddings(world):
    model = world.wrap(nn.EmbeddingBag(10, 4, sparse=True, mode="sum"))
    for _ in range(3):
        model(torch.arange(6).reshape(2, 3)).sum().backward()
    return buckets.fix_buckets(model)


def test_sparse_gradients_are_left_to_ddp():
    assert run_ranks(trains_sparse_embeddings, 2) == [False, False]
