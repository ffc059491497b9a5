"""torch without a private name that `parallel` uses: DDP that is not timed, and one warning that names it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.parallel import Compilations, torch_private, unwrap
from allstep.parallel.buckets import fix_buckets
from allstep.parallel.wrap import hold_group
from allstep.testing import run_ranks
from allstep.world import World


class BackwardOnly:
    """torch's autograd engine without `queue_callback`."""

    def __init__(self, engine: Any) -> None:
        self.run_backward = engine.run_backward


class OtherDDP:
    """Stands for a DDP that has no `_pre_forward`."""


def _without_engine_callbacks(patch: pytest.MonkeyPatch) -> None:
    engine = torch.autograd.Variable._execution_engine
    patch.setattr(torch.autograd.Variable, "_execution_engine", BackwardOnly(engine))


def _without_pre_forward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_private, "DistributedDataParallel", OtherDDP)


def _without_disable_dynamo(patch: pytest.MonkeyPatch) -> None:
    patch.delattr("torch._compile._disable_dynamo")


TIMING: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "_execution_engine": _without_engine_callbacks,
    "_pre_forward": _without_pre_forward,
    "_disable_dynamo": _without_disable_dynamo,
}


@contextlib.contextmanager
def said_once(name: str) -> Iterator[None]:
    """The body warns of the name that this torch lacks, exactly once."""
    torch_private._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(each.message) for each in caught if "update allstep" in str(each.message)]
    assert len(said) == 1, said
    assert name in said[0]


def train_plainly(world: World, name: str) -> tuple[str, bool]:
    with pytest.MonkeyPatch.context() as patch:
        TIMING[name](patch)
        with said_once(name):
            models = [world.wrap(nn.Linear(2, 2), deterministic=False) for _ in range(2)]
        model = models[0]
        model(torch.full((1, 2), float(world.rank))).sum().backward()
        gradients = world.all_gather(unwrap(model).weight.grad)
    return type(model).__name__, torch.equal(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMING)
def test_ddp_is_not_timed_where_its_waits_cannot_be(name):
    assert run_ranks(train_plainly, 2, name) == [("Replica", True)] * 2


def test_nothing_is_said_where_torch_has_all_names():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch_private.can_time_ddp()


@pytest.fixture
def ddp() -> Iterator[DistributedDataParallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(nn.Linear(2, 2))
    hold_group(model)  # pytest frees it after the group is destroyed
    yield model
    dist.destroy_process_group()


def test_buckets_stay_ddps_own_without_the_reducers_rebuild(ddp):
    reducer, ddp.reducer = ddp.reducer, object()
    with said_once("Reducer._rebuild_buckets"):
        assert [fix_buckets(ddp), fix_buckets(ddp)] == [False, False]
    ddp.reducer = reducer
    ddp(torch.ones(1, 2)).sum().backward()


def test_buckets_stay_ddps_own_without_its_mark_of_the_final_layout(ddp):
    mark = ddp._has_rebuilt_buckets
    del ddp._has_rebuilt_buckets
    with said_once("_has_rebuilt_buckets"):
        assert [fix_buckets(ddp), fix_buckets(ddp)] == [False, False]
    ddp._has_rebuilt_buckets = mark
    ddp(torch.ones(1, 2)).sum().backward()


def test_a_compiled_module_is_known_without_torchs_class_of_them(monkeypatch):
    module = nn.Linear(2, 2)
    compiled = torch.compile(module)
    monkeypatch.delattr(sys.modules["torch._dynamo.eval_frame"], "OptimizedModule")
    assert unwrap(compiled) is module
    assert unwrap(module) is module


def test_a_compiled_module_that_hides_its_original_is_taken_as_it_is(monkeypatch):
    torch.compile(nn.Linear(2, 2))  # imports the compiler

    class Compiled(nn.Linear):
        pass

    monkeypatch.setattr(sys.modules["torch._dynamo.eval_frame"], "OptimizedModule", Compiled)
    module = Compiled(2, 2)
    with said_once("_orig_mod"):
        assert unwrap(module) is module
        assert unwrap(module) is module


def test_timing_leaves_nothing_to_a_function_without_disable_dynamo(monkeypatch):
    monkeypatch.delattr("torch._compile._disable_dynamo")
    assert torch_private.not_compiled(len) is len


def test_compilations_are_not_counted_without_torchs_record_of_them(monkeypatch):
    import torch._dynamo.utils

    monkeypatch.delattr(torch._dynamo.utils, "get_compilation_metrics")
    with said_once("torch._dynamo.utils.get_compilation_metrics"):
        assert Compilations().in_words() == "not counted by this torch"
        assert Compilations().in_words() == "not counted by this torch"
