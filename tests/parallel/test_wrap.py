"""Wrapping a module in DDP and getting it back."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.errors import ParallelError
from allstep.parallel import unwrap, wrap_module
from allstep.testing import run_ranks

CPU = torch.device("cpu")


def test_a_world_of_one_gets_its_own_module_back():
    module = nn.Linear(2, 2)
    assert wrap_module(module, CPU, 1) is module


def test_a_world_of_one_moves_the_module():
    assert wrap_module(nn.Linear(2, 2), torch.device("meta"), 1).weight.device.type == "meta"


@pytest.mark.parametrize("world_size", [1, 2])
def test_sync_batchnorm_on_the_cpu_is_refused_in_a_world_of_any_size(world_size):
    with pytest.raises(
        ParallelError, match=r"sync_batchnorm=True.*CUDA and its like.*cpu; give sync_batchnorm=world\.device"
    ):
        wrap_module(nn.BatchNorm1d(2), CPU, world_size, sync_batchnorm=True)


@pytest.mark.parametrize(
    ("place", "has_it"),
    [("mps", False), ("xla:0", False), ("cuda:1", True), ("xpu:1", True), ("privateuseone:1", True)],
)
def test_sync_batchnorm_is_used_on_devices_for_which_torch_has_it(place, has_it, monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)  # stand-in: there is no such device here
    module = nn.Sequential(nn.BatchNorm1d(2)).requires_grad_(False)
    with nullcontext() if has_it else pytest.raises(ParallelError, match=f"the device is {place}"):
        wrapped = wrap_module(module, torch.device(place), 2, sync_batchnorm=True)
        assert type(wrapped[0]) is nn.SyncBatchNorm


def test_a_module_without_trainable_parameters_is_only_moved():
    module = nn.Linear(2, 2).requires_grad_(False)
    assert wrap_module(module, CPU, 2) is module


def test_unwrap_of_a_bare_module_is_itself():
    module = nn.Linear(2, 2)
    assert unwrap(module) is module


def test_unwrap_goes_through_data_parallel_and_compile_in_any_nesting():
    module = nn.Linear(2, 2)
    assert unwrap(torch.compile(nn.DataParallel(torch.compile(module)))) is module


def gradients(world):
    """The wrapped module's gradients on this rank's half of a batch, and the bare module's on all of it."""
    torch.manual_seed(world.rank)  # DDP has to make the ranks' different weights equal
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    wrapped = world.wrap(module)
    batch = torch.arange(12.0).reshape(4, 3) / 12
    wrapped(batch[world.rank * 2 : world.rank * 2 + 2]).mean().backward()
    averaged = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module(batch).mean().backward()
    whole = [parameter.grad for parameter in module.parameters()]
    facts = (
        isinstance(wrapped, DistributedDataParallel),
        wrapped.gradient_as_bucket_view,
        world.unwrap(wrapped) is module,
    )
    return averaged, whole, facts


def test_gradients_of_two_ranks_are_those_of_the_whole_batch_on_both():
    (first, whole, facts), (second, _, _) = run_ranks(gradients, 2)
    assert facts == (True, True, True)
    for mine, theirs, all_samples in zip(first, second, whole, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, all_samples)


def wrap_twice(world):
    wrapped = world.wrap(nn.Linear(2, 2), gradient_as_bucket_view=False, broadcast_buffers=False)
    try:
        world.wrap(wrapped)
    except ParallelError as error:
        return wrapped.gradient_as_bucket_view, wrapped.broadcast_buffers, str(error)


def test_ddp_options_hold_over_defaults_and_wrapping_twice_is_refused():
    for bucket_view, buffers, message in run_ranks(wrap_twice, 2):
        assert (bucket_view, buffers) == (False, False)
        assert "wrapped in DDP already" in message


OUTLIVES = """
import faulthandler
import torch, torch.distributed as dist
from allstep.parallel.wrap import hold_group
faulthandler.dump_traceback_later(60, exit=True)  # a thread that waits for the interpreter's lock answers no signal
for _ in range(300):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    hold_group(model)
    model(torch.ones(2, 3)).sum().backward()
    dist.destroy_process_group()
    del model
"""


AGAIN = """\
    model = Replica(model.module, deterministic=True, sync_batchnorm=False)
    hold_group(model)
    model.rewrap()
"""
REWRAPPED = "from allstep.parallel.replica import Replica" + OUTLIVES.replace("    hold_group(model)\n", AGAIN)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_rewrapped_model_that_outlives_its_group_is_freed_too():
    done = subprocess.run([sys.executable, "-c", REWRAPPED], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_model_that_outlives_its_group_is_freed_and_nothing_stands_still():
    done = subprocess.run([sys.executable, "-c", OUTLIVES], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
