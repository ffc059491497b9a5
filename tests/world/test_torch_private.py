"""torch without a private name that `world` uses: what is done instead, and that it is said once."""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import allstep
from allstep.testing import run_ranks
from allstep.world import World, torch_private
from allstep.world.process_group import forget_groups

NAMES = ["_get_default_store", "_world.pg_map", "_abort_process_group"]


@contextlib.contextmanager
def torch_without(name: str):
    """torch's module of process groups, in which a name is missing; torch's own code still has it."""
    real = dist.distributed_c10d

    class Without:
        def __getattr__(self, asked: str):
            if asked == name.partition(".")[0]:
                if "." in name:
                    return object()  # `_world` is there, and lacks what it had
                raise AttributeError(asked)
            return getattr(real, asked)

    dist.distributed_c10d = Without()
    try:
        yield
    finally:
        dist.distributed_c10d = real


def adopt(world: World, path: Path, name: str) -> tuple[list[object], list[str]]:
    """Two Worlds in a row in the script's own group, in which ranks also wait for each other at its store."""
    rank, world_size = world.rank, world.world_size
    world.close()
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    seen: list[object] = []
    with torch_without(name), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            with allstep.init() as adopted:
                with adopted.main_first():
                    pass
                seen.append(adopted.all_reduce(rank))
    seen.append(dist.is_initialized())
    dist.destroy_process_group()
    return seen, [str(each.message) for each in said if "update allstep" in str(each.message)]


def test_an_adopted_group_has_a_store_without_torchs_default_one(tmp_path):
    for seen, said in run_ranks(adopt, 2, tmp_path / "store", "_get_default_store"):
        assert seen == [1, 1, True]
        assert len(said) == 1
        assert "_get_default_store" in said[0]


def forget_with_work_pending(world: World) -> tuple[bool, float, list[str]]:
    """Forget the groups while a collective is pending, which never completes: its destructor would wait for that."""
    work = dist.all_reduce(torch.ones(3), async_op=True) if world.rank == 1 else None
    began = time.monotonic()
    with torch_without("_world.pg_map"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        forget_groups(abort=True)
    took = time.monotonic() - began
    del work
    return dist.is_initialized(), took, [str(each.message) for each in said]


def test_groups_are_forgotten_at_once_without_torchs_list_of_them():
    for initialised, took, said in run_ranks(forget_with_work_pending, 2):
        assert not initialised
        assert took < 20
        assert len(said) == 1
        assert "_world.pg_map" in said[0]


def abort_as_nccl(world: World) -> tuple[bool, list[str]]:
    """Forget groups that say they are nccl's; gloo's cannot abort, which nothing may be raised for."""
    name = "_abort_process_group"
    with torch_without(name), warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr("allstep.world.process_group.open_groups", lambda known: {dist.group.WORLD: "nccl"})
        forget_groups(abort=True)
    return dist.is_initialized(), [str(each.message) for each in said]


def test_nccl_groups_are_forgotten_without_torchs_abort():
    for initialised, said in run_ranks(abort_as_nccl, 2):
        assert not initialised
        assert len([each for each in said if "_abort_process_group" in each]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_world_of_one_needs_none_of_the_names(name, bare_environment):
    with torch_without(name), warnings.catch_warnings():
        warnings.simplefilter("error")
        with allstep.init(device="cpu") as world:
            assert world.all_reduce(1) == 1


def test_the_module_says_of_each_name_what_happens_without_it():
    assert all(name in torch_private.__doc__ for name in NAMES)
