"""DDP over torch_xla's backend. Its runtime on the CPU connects no processes, so the group is of one rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from tests.jobs.ports import free_port
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import allstep
from allstep.parallel import wrap_module


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[allstep.World]:
    """A World over a group that the script opened as torch_xla's guide says."""
    pytest.importorskip("torch_xla.distributed.xla_backend")
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("xla", init_method="xla://")
    try:
        with allstep.init(device="xla") as opened:
            yield opened
    finally:
        dist.destroy_process_group()


def losses(model: nn.Module, device: torch.device) -> list[float]:
    """Three steps of two micro-batches each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(6):
        holds_back = step % 2 == 0 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if holds_back else nullcontext():
            loss = model(torch.randn(5, 4, generator=generator).to(device)).square().mean()
            loss.backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_wrapped_module_trains_as_the_plain_one(world, deterministic):
    assert (world.backend, world.device.type) == ("xla", "xla")
    world.seed_everything(1)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    wrapped = wrap_module(copy.deepcopy(plain), world.device, 2, deterministic=deterministic)
    assert isinstance(wrapped, DistributedDataParallel)
    assert losses(wrapped, world.device) == losses(plain.to(world.device), world.device)
