"""Votes and profilers: a vote under way when a profiler stops must not be known to it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from allstep.coordination import GroupCoordinator
from allstep.coordination.torch_private import unrecorded
from allstep.testing import run_ranks
from allstep.world import World


def _recorded(world: World) -> tuple[list[int], int]:
    """What a vote gave, and how many collectives a profiler saw of it and of one that a script makes itself."""
    coordinator = GroupCoordinator(lambda: dist.new_group(backend="gloo"), world.rank, world.world_size)
    with profile(activities=[ProfilerActivity.CPU]) as running:
        vote = coordinator.vote([1, world.rank])
        dist.all_reduce(torch.ones(1))
    return vote.wait(), sum(each.name == "gloo:all_reduce" for each in running.events())


@pytest.mark.slow
def test_a_profiler_records_no_vote_and_every_collective_of_the_script():
    assert run_ranks(_recorded, 2) == [([2, 1], 1)] * 2


def _seen() -> bool:
    """Whether a profiler sees what `unrecorded` starts."""
    with profile(activities=[ProfilerActivity.CPU]) as running:
        unrecorded(lambda: torch.ones(2) + 1)
        torch.ones(2) * 2
    names = [each.name for each in running.events()]
    assert "aten::mul" in names  # all else is recorded
    return "aten::add" in names


def test_what_is_started_unrecorded_is_not_seen_and_the_rest_is():
    assert not _seen()


@pytest.mark.parametrize("name", ["_profiler_enabled", "_enable_record_function"])
def test_without_torchs_name_it_is_started_all_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.autograd, name)
    assert _seen()
