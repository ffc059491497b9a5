"""DDP that tells an activity when it waits: what it leaves alone. That it measures is shown over real ranks, in
tests/world/test_monitor_link.py."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from allstep.parallel import unwrap
from allstep.parallel.timed_ddp import TimedDDP
from allstep.parallel.wrap import hold_group
from allstep.protocol.heartbeat import RankActivity
from allstep.testing import run_ranks
from allstep.world import World


class NotingActivity(RankActivity):
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def wait_began(self, what: str) -> None:
        self.waits.append(what)
        super().wait_began(what)


@pytest.fixture
def watched():
    """A model of a group of one, whose activity notes what it is told."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = TimedDDP(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    model.activity = NotingActivity()
    hold_group(model)  # pytest frees it after the group is destroyed
    yield model
    del model
    dist.destroy_process_group()


def test_each_backward_pass_waits_for_gradients_once(watched):
    for _ in range(3):
        watched(torch.ones(2, 3)).sum().backward()
    assert watched.activity.waits == ["buffers", "gradients"] * 3
    assert watched.activity.waiting == ""


def test_two_forward_passes_of_one_backward_pass_are_one_wait(watched):
    (watched(torch.ones(2, 3)) + watched(torch.zeros(2, 3))).sum().backward()
    assert watched.activity.waits == ["buffers", "buffers", "gradients"]
    assert watched.activity.waiting == ""


def test_a_compiled_model_waits_alike_and_torch_warns_of_nothing_in_it(watched):
    compiled = torch.compile(watched, backend="eager")
    with warnings.catch_warnings(record=True) as warned:
        for _ in range(3):
            compiled(torch.ones(2, 3)).sum().backward()
    assert watched.activity.waits == ["buffers", "gradients"] * 3
    assert not [each for each in warned if "Dynamo" in str(each.message)]


def test_inside_no_sync_and_without_gradients_nothing_waits_for_them(watched):
    with watched.no_sync():
        watched(torch.ones(2, 3)).sum().backward()
    with torch.no_grad():
        watched(torch.ones(2, 3))
    assert "gradients" not in watched.activity.waits


def test_a_backward_pass_that_raises_leaves_the_next_one_measured(watched):
    output = watched(torch.ones(2, 3))

    def fail(gradient: torch.Tensor) -> None:
        raise ValueError("in backward")

    output.register_hook(fail)
    with pytest.raises(ValueError, match="in backward"):
        output.sum().backward()
    watched.activity.waits.clear()
    watched(torch.ones(2, 3)).sum().backward()
    assert watched.activity.waits == ["buffers", "gradients"]
    assert watched.activity.waiting == ""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_tells_nobody_and_computes_the_same(watched, copied):
    other = copied(watched)
    assert other.activity is None
    batch = torch.ones(2, 3)
    assert torch.equal(other(batch), watched(batch))
    other(batch).sum().backward()
    assert "activity" not in watched.state_dict()
    assert "gradients" not in watched.activity.waits


class Nested(nn.Module):
    """Gives its outputs in a dict of lists, one of which the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"unused": self.first(x).detach(), "used": [self.first(x), (self.second(x),)], "n": 3}


def test_outputs_may_be_nested(watched):
    model = TimedDDP(Nested())
    model.activity = activity = NotingActivity()
    used = model(torch.ones(2, 3))["used"]
    (used[0] + used[1][0]).sum().backward()
    assert activity.waits == ["buffers", "gradients"]


def same_gradients(world: World) -> bool:
    torch.manual_seed(0)
    module = nn.Linear(4, 2)
    model = world.wrap(copy.deepcopy(module))
    plain = nn.parallel.DistributedDataParallel(module)
    batch = torch.randn(3, 4) + world.rank
    for each in (model, plain):
        each(batch).square().sum().backward()
    pairs = zip(unwrap(model).parameters(), module.parameters(), strict=True)
    return isinstance(model, TimedDDP) and all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_gradients_are_those_of_plain_ddp():
    assert run_ranks(same_gradients, 2) == [True, True]
