"""What DDP that notices changes says of them. That ranks follow them is shown in tests/situations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from allstep.errors import ModelChangedError, ParallelError
from allstep.parallel import rewrap, wrap_module
from allstep.parallel.replica import Replica, in_short


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


@pytest.fixture
def new() -> Iterator[Callable[..., Replica]]:
    """Makes replicas in a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made: list[Replica] = []

    def make(module: nn.Module | None = None, **options: object) -> Replica:
        made.append(Replica(module or model(), **options))
        return made[-1]

    yield make
    made.clear()
    dist.destroy_process_group()


def test_nothing_has_changed_in_what_was_just_wrapped(new):
    assert new().changes() == []


def test_each_change_has_its_clause(new):
    module = model()
    module[0].weight.requires_grad_(False)
    replica = new(module)
    module[0].weight.requires_grad_(True)
    module[0].bias.requires_grad_(False)
    module[1].weight = nn.Parameter(torch.ones(1, 2))
    module[1].bias.data = module[1].bias.data.double()
    module.append(nn.Linear(1, 1, bias=False))
    assert replica.changes() == [
        "0.weight requires gradients now",
        "0.bias is frozen now",
        "1.weight is another tensor",
        "1.bias was float32 [1] on cpu and is float64 [1] on cpu",
        "2.weight is new",
    ]


def test_a_parameter_that_is_gone_is_a_change(new):
    module = model()
    replica = new(module)
    module[1].bias = None
    assert replica.changes() == ["1.bias is gone"]


def test_a_cast_and_back_is_a_change_because_ddps_hooks_are_gone(new):
    replica = new()
    replica.module[0].double().float()
    assert replica.changes() == ["0.weight was moved or cast, and back", "0.bias was moved or cast, and back"]
    rewrap(replica)
    assert replica.changes() == []


def test_a_layer_that_moves_within_the_model_is_none(new):
    module = model()
    replica = new(module)
    first, second = module
    module[0], module[1] = nn.Identity(), nn.Sequential(first, second)
    assert replica.changes() == []


def test_a_module_that_is_frozen_whole_is_none(new):
    replica = new()
    replica.requires_grad_(False)
    assert replica.changes() == []
    replica(torch.ones(1, 2, requires_grad=True)).sum().backward()


def test_what_was_frozen_is_none_where_ddp_looks_for_unused_parameters(new):
    replica = new(find_unused_parameters=True)
    replica.module[0].requires_grad_(False)
    assert replica.changes() == []
    replica.module.append(nn.Linear(1, 1))
    assert replica.changes() == ["2.weight is new", "2.bias is new"]


def test_parameters_that_ddp_is_told_to_ignore_are_none(new):
    module = model()
    module._ddp_params_and_buffers_to_ignore = ["0.weight"]
    replica = new(module)
    module[0].weight.requires_grad_(False)
    assert replica.changes() == []


def test_a_forward_pass_that_is_to_reduce_says_what_has_changed(new):
    replica = new()
    replica.module[0].bias.requires_grad_(False)
    with pytest.raises(ModelChangedError, match=r"0\.bias is frozen now.*world\.rewrap\(model\)"):
        replica(torch.ones(1, 2))
    with torch.no_grad():
        replica(torch.ones(1, 2))
    with replica.no_sync():
        replica(torch.ones(1, 2))
    rewrap(replica)
    replica(torch.ones(1, 2)).sum().backward()
    assert replica.module[0].bias.grad is None


def test_backward_passes_that_reduce_are_counted_each_once(new):
    replica = new()
    (replica(torch.ones(1, 2)) + replica(torch.zeros(1, 2))).sum().backward()
    output = replica(torch.ones(1, 2)).sum()
    output.backward(retain_graph=True)
    assert replica.backward_passes == 2
    with replica.no_sync():
        replica(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        replica(torch.ones(1, 2))
    replica(torch.ones(1, 2))  # no backward pass
    assert replica.backward_passes == 2
    rewrap(replica)
    assert replica.backward_passes == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda replica: pickle.loads(pickle.dumps(replica))])
def test_a_copy_notices_its_own_changes(new, copied):
    replica = new(deterministic=True)
    other = copied(replica)
    other.module[0].requires_grad_(False)
    assert other.changes() == ["0.weight is frozen now", "0.bias is frozen now"]
    assert replica.changes() == []
    rewrap(other)
    assert other.changes() == []
    other(torch.ones(1, 2)).sum().backward()
    assert replica.module[1].weight.grad is None


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_a_compiled_replica_follows_a_change(new, backend):
    module = model()
    module[0].requires_grad_(False)
    replica = new(module)
    compiled = torch.compile(replica, backend=backend)
    compiled(torch.ones(1, 2)).sum().backward()
    module[0].requires_grad_(True)
    with pytest.raises(ModelChangedError):
        compiled(torch.ones(1, 2))
    rewrap(compiled)
    compiled(torch.ones(1, 2)).sum().backward()
    assert module[0].weight.grad is not None
    assert replica.backward_passes == 2


def test_a_module_of_ddps_own_mixed_precision_cannot_be_wrapped_again(new):
    replica = new()
    replica.mixed_precision = object()
    with pytest.raises(ParallelError, match=r"mixed_precision=.*torch\.autocast"):
        replica.rewrap()


def test_rewrap_of_a_module_that_is_not_in_ddp_says_what_to_do():
    with pytest.raises(ParallelError, match=r"Linear.*model = world\.wrap\(module\)"):
        rewrap(wrap_module(nn.Linear(1, 1), torch.device("cpu"), 1))


def test_many_changes_are_named_in_part():
    assert in_short([f"{each} is new" for each in range(8)]).endswith("4 is new; and 3 more")
