"""Worlds on CUDA machines, by stand-ins: torch's fake process group, and mocks of `torch.cuda` and `torch.accelerator`.

Nothing here runs on a GPU; `tests/gpu` does.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # makes "fake" a backend

import allstep
from allstep.coordination import Alone
from allstep.errors import WorldError
from allstep.placement import Placement, Rendezvous
from allstep.protocol.heartbeat import RankActivity
from allstep.world import process_group
from allstep.world.bounded_store import BoundedStore
from allstep.world.device import bound_device, choose_transport
from allstep.world.internals import WorldInternals
from allstep.world.membership import Membership
from allstep.world.process_group import adopt_group, collective_limit, open_group
from allstep.world.rendezvous import RendezvousInfo


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A process that sees two CUDA devices; what it makes the current one is listed."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    return chosen


@pytest.fixture
def cuda_group(monkeypatch: pytest.MonkeyPatch):
    """A default group of one rank that a script opened without naming a backend on a CUDA machine."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_backend", lambda *_: "undefined")
    monkeypatch.setattr(dist, "get_backend_config", lambda *_: "cuda:nccl")
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_without_a_named_backend_is_adopted_by_its_devices(cuda_group, two_gpus):
    group = adopt_group(60.0)
    assert (group.backend, group.carrier()) == ("nccl", torch.device("cuda", 1))
    assert choose_transport(torch.device("cuda", 0), group.backend) == torch.device("cuda", 0)


def test_the_device_that_a_group_is_bound_to_is_kept(cuda_group, two_gpus, monkeypatch):
    cuda_group.bound_device_id = torch.device("cuda", 1)
    with allstep.init() as world:
        assert world.device == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 1)]
    with pytest.raises(WorldError, match=r"device is 'cuda:0', but .* bound to cuda:1"):
        allstep.init(device="cuda:0")


@pytest.mark.parametrize(
    ("device", "backend", "bound"),
    [
        ("cuda:1", "nccl", True),
        ("cuda:1", "cpu:gloo,cuda:nccl", True),
        ("cpu", "cpu:gloo,cuda:nccl", False),
        ("cuda:1", "gloo", False),
        ("cpu", "gloo", False),
    ],
)
def test_nccl_is_bound_to_its_device_however_it_is_named(device, backend, bound):
    device = torch.device(device)
    assert bound_device(device, backend) == (device if bound else None)


@pytest.mark.parametrize(
    ("backend", "timeout", "limits", "limit"),
    [
        ("gloo", 600.0, "", 600.0),
        ("nccl", 600.0, "", 3720.0),  # the longest limit of a section, and time to report
        ("cpu:gloo,cuda:nccl", 600.0, "", 3720.0),
        ("nccl", 7200.0, "", 7200.0),
        ("nccl", 600.0, "checkpoint=off,handler=off,evaluation=off,step=60,data=60", 600.0),
        ("nccl", 600.0, "handler=9000", 9120.0),
    ],
)
def test_nccls_limit_stands_above_the_watch_over_hangs(monkeypatch, backend, timeout, limits, limit):
    monkeypatch.setenv("ALLSTEP_LIMITS", limits)
    assert collective_limit(backend, timeout) == limit


def test_a_group_is_opened_with_that_limit_and_bound(monkeypatch):
    given = {}
    monkeypatch.delenv("ALLSTEP_LIMITS", raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: given.update(rest, backend=backend))
    placement = Placement("torchrun", rank=0, world_size=2, local_world_size=2, rendezvous=Rendezvous("here", (1,)))
    info = RendezvousInfo(BoundedStore(dist.HashStore()))
    open_group(placement, info, "cpu:gloo,cuda:nccl", torch.device("cuda", 1), 60.0)
    assert given["device_id"] == torch.device("cuda", 1)
    assert given["timeout"] == timedelta(seconds=3720)


@pytest.fixture
def open_nccl(monkeypatch):
    """torch.distributed as with one group of NCCL; what is called is listed, and destroying it does not come back."""
    calls: list[str] = []
    release = threading.Event()

    def destroy() -> None:
        calls.append("destroy")
        release.wait(60)

    monkeypatch.setattr(process_group, "open_groups", lambda known: {object(): "nccl"})
    monkeypatch.setattr(process_group, "abort_nccl_groups", lambda groups: calls.append("abort"))
    monkeypatch.setattr(process_group, "_NCCL_LEAVE_S", 0.2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    yield calls
    release.set()


def test_a_group_of_nccl_that_does_not_let_go_is_given_up(open_nccl):
    with pytest.warns(RuntimeWarning, match=r"nccl did not let go of its groups within 0.2 s"):
        process_group.forget_groups(abort=False)
    assert open_nccl == ["destroy", "abort"]


def test_an_abort_that_does_not_come_back_is_given_up_too(open_nccl, monkeypatch):
    stuck = threading.Event()
    monkeypatch.setattr(process_group, "abort_nccl_groups", lambda groups: stuck.wait(60))
    monkeypatch.setattr(process_group, "_NCCL_ABORT_S", 0.2)
    process_group.forget_groups(abort=True)
    stuck.set()


def test_the_watch_is_told_goodbye_before_the_group_is_taken_down():
    done: list[str] = []
    told = SimpleNamespace(
        say_goodbye=lambda: done.append("goodbye"), end=lambda failed: done.append("end"), left_open=lambda: None
    )
    for failed in (False, True):
        group = SimpleNamespace(leave=lambda **_: done.append("group"), parts=list)
        internals = WorldInternals(Alone(), RankActivity(), told)
        Membership(threading.Event(), Placement("torchrun"), group, internals, 60.0).leave(failed=failed)
    assert done == ["goodbye", "group", "end", "group", "end"]
