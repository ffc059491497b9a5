"""torch without a private name that plans need: an error that names it, and nothing left behind."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from allstep.errors import ParallelError
from allstep.planning.torch_private import fake_ranks, group_name
from allstep.world import plan_training

NAMES = [
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.testing._internal.distributed.fake_pg.FakeStore",
    "torch.distributed.distributed_c10d._update_default_pg",
    "torch.distributed.tensor.debug._clear_sharding_prop_cache",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_without_a_name_says_which_it_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that all of them are imported.
    plan_training(nn.Linear(4, 4), torch.zeros(2, 4), device=torch.device("cpu"), mesh={"shard": 2})
    monkeypatch.delattr(name)
    with pytest.raises(ParallelError, match=name.replace(".", r"\.")):
        plan_training(nn.Linear(4, 4), torch.zeros(2, 4), device=torch.device("cpu"))
    assert not dist.is_initialized()


def test_a_plan_without_the_map_of_groups_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.distributed_c10d._world", object())
    with pytest.raises(ParallelError, match=r"_world\.pg_map"), fake_ranks(2):
        pass


def test_fake_ranks_leave_no_group_behind() -> None:
    hook = sys.excepthook
    with fake_ranks(512):
        group = dist.new_group(list(range(8)))
        assert dist.get_world_size() == 512
        assert group_name(group) == group.group_name
    assert not dist.is_initialized()
    assert sys.excepthook is hook
    assert group not in dist.distributed_c10d._world.pg_map
