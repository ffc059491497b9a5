"""Leaving a group, seen from one rank; the store is one within this process, or that of a process that freezes."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from allstep.world.bounded_store import BoundedStore
from allstep.world.process_group import Group
from allstep.world.rendezvous import RendezvousInfo
from tests.jobs.processes import freeze
from tests.world.frozen_store import served_store

BOUND = 30.0  # seconds; far below the patience that the tests give


def connected(world_size: int) -> BoundedStore:
    store = BoundedStore(dist.HashStore())
    store.add("connected", world_size)
    return store


def test_the_main_rank_names_who_did_not_leave_and_goes():
    store = connected(4)
    store.add("left", 1)
    store.set("left/2", "")
    group = Group("gloo", RendezvousInfo(store, server=object()), rank=0, world_size=4)
    with pytest.warns(RuntimeWarning, match=r"waited 0.1 s for ranks \[1, 3\] to close their World"):
        group.leave(failed=False, patience=0.1)


def test_a_rank_that_serves_nothing_waits_for_nobody():
    store = connected(4)
    Group("gloo", RendezvousInfo(store), rank=1, world_size=4).leave(failed=False, patience=60)
    assert store.check(["left/1"])


def test_a_group_of_the_user_is_not_touched():
    store = connected(4)
    Group("gloo", RendezvousInfo(store), rank=1, world_size=4, owned=False).leave(failed=True, patience=60)
    assert not store.check(["left/1"])


@pytest.mark.slow
def test_a_rank_whose_store_is_frozen_says_so_and_leaves():
    with served_store() as (server, port):
        raw = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=600), wait_for_workers=False)
        store = BoundedStore(raw, patience=1.0)
        store.add("connected", 2)
        freeze(server.pid)
        began = time.monotonic()
        with pytest.warns(RuntimeWarning, match=r"did not answer within 1 s; .*may be frozen.*closes its World"):
            Group("gloo", RendezvousInfo(store), rank=1, world_size=2).leave(failed=False, patience=600)
        assert time.monotonic() - began < BOUND


@pytest.mark.slow
def test_a_rank_that_fails_does_not_wait_for_a_frozen_store():
    with served_store() as (server, port):
        raw = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=600), wait_for_workers=False)
        store = BoundedStore(raw)
        freeze(server.pid)
        began = time.monotonic()
        Group("gloo", RendezvousInfo(store), rank=1, world_size=2).leave(failed=True, patience=600)
        assert time.monotonic() - began < BOUND
