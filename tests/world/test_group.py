"""Leaving a group, seen from the rank that serves the store; the store is one within this process."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from allstep.world.group import Group
from allstep.world.rendezvous import Meeting


def test_the_main_rank_names_who_did_not_leave_and_goes():
    store = dist.HashStore()
    store.add("connected", 4)
    store.add("left", 1)
    store.set("left/2", "")
    group = Group("gloo", Meeting(store, server=object()), rank=0, world_size=4)
    with pytest.warns(RuntimeWarning, match=r"waited 0.1 s for ranks \[1, 3\] to close their World"):
        group.leave(failed=False, patience=0.1)


def test_a_rank_that_serves_nothing_waits_for_nobody():
    store = dist.HashStore()
    store.add("connected", 4)
    Group("gloo", Meeting(store), rank=1, world_size=4).leave(failed=False, patience=60)
    assert store.check(["left/1"])


def test_a_group_of_the_user_is_not_touched():
    store = dist.HashStore()
    Group("gloo", Meeting(store), rank=1, world_size=4, owned=False).leave(failed=True, patience=60)
    assert not store.check(["left/1"])
