"""Which device and backend a rank chooses: tables of pure decisions. The hardware is made up, not present."""

from __future__ import annotations

import pytest
import torch

import allstep
from allstep.errors import WorldError
from allstep.placement import Placement, Rendezvous
from allstep.world.device import VisibleHardware, choose_backend, choose_device, choose_transport


def placed(local_rank: int = 0, local_world_size: int = 1, launcher="torchrun") -> Placement:
    return Placement(
        launcher,
        rank=local_rank,
        world_size=local_world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        rendezvous=Rendezvous("here", (1,)),
    )


@pytest.mark.parametrize(
    ("placement", "hardware", "asked", "device"),
    [
        (placed(), VisibleHardware(), None, "cpu"),
        (placed(), VisibleHardware(cuda=1), None, "cuda:0"),
        (placed(), VisibleHardware(cuda=8), None, "cuda:0"),
        (placed(3, 4), VisibleHardware(cuda=4), None, "cuda:3"),
        (placed(3, 4), VisibleHardware(cuda=1), None, "cuda:0"),  # the scheduler shows each task its own
        (placed(1, 2), VisibleHardware(cuda=4), "cuda", "cuda:1"),
        (placed(1, 2), VisibleHardware(cuda=4), "cuda:3", "cuda:3"),
        (placed(1, 2), VisibleHardware(cuda=4), torch.device("cuda", 2), "cuda:2"),
        (placed(1, 2), VisibleHardware(cuda=4), "cpu", "cpu"),
        (placed(), VisibleHardware(mps=True), None, "mps"),
        (placed(1, 2), VisibleHardware(mps=True), None, "cpu"),
        (placed(), VisibleHardware(cuda=1), "xla", "xla"),
        (placed(launcher="xla"), VisibleHardware(cuda=1), None, "xla"),
        (placed(1, 2), VisibleHardware(pjrt="TPU"), None, "xla"),
        (placed(1, 2), VisibleHardware(pjrt="TPU"), "cpu", "cpu"),
        (placed(), VisibleHardware(cuda=1, pjrt="CPU"), None, "cuda:0"),
    ],
)
def test_device_of_a_rank(placement, hardware, asked, device):
    assert choose_device(placement, hardware, asked) == torch.device(device)


@pytest.mark.parametrize(
    ("placement", "hardware", "asked", "message"),
    [
        (
            placed(2, 4),
            VisibleHardware(cuda=2),
            None,
            "local rank 2 of 4 sees 2 CUDA devices; start at most 2 processes",
        ),
        (placed(), VisibleHardware(), "cuda", "sees no CUDA device"),
        (placed(), VisibleHardware(cuda=2), "cuda:2", "'cuda:2', but this process sees 2 CUDA devices"),
        (placed(), VisibleHardware(), "mps", "MPS is not available"),
        (placed(1, 2), VisibleHardware(mps=True), "mps", "world of 2.*do not support MPS"),
        (placed(), VisibleHardware(), "gpu", "'gpu', which torch does not know"),
    ],
)
def test_device_that_is_not_there_is_named(placement, hardware, asked, message):
    with pytest.raises(WorldError, match=message):
        choose_device(placement, hardware, asked)


@pytest.mark.parametrize(
    ("device", "asked", "backend"),
    [
        ("cpu", None, "gloo"),
        ("cuda:1", None, "nccl"),
        ("mps", None, "gloo"),
        ("xla", None, "xla"),
        ("cuda:0", "gloo", "gloo"),
        ("cpu", "GLOO", "gloo"),
        ("cuda:0", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl"),
    ],
)
def test_backend_for_a_device(device, asked, backend):
    assert choose_backend(torch.device(device), asked) == backend


@pytest.mark.parametrize(("asked", "message"), [("nccl", "needs a CUDA device"), ("smoke", "'smoke'.*it has .*gloo")])
def test_backend_that_cannot_serve_is_named(asked, message):
    with pytest.raises(WorldError, match=message):
        choose_backend(torch.device("cpu"), asked)


@pytest.mark.parametrize(
    ("device", "backend", "transport"),
    [
        ("cpu", "gloo", "cpu"),
        ("cuda:1", "nccl", "cuda:1"),
        ("cuda:1", "gloo", "cpu"),
        ("cuda:1", "cpu:gloo,cuda:nccl", "cuda:1"),
        ("mps", "gloo", "cpu"),
        ("xla", "xla", "xla"),
    ],
)
def test_tensors_travel_from_where_the_backend_can_take_them(device, backend, transport):
    assert choose_transport(torch.device(device), backend) == torch.device(transport)


def test_the_launcher_says_the_device_where_the_script_does_not(monkeypatch):
    monkeypatch.setenv("ALLSTEP_DEVICE", "toaster")
    with pytest.raises(WorldError, match="'toaster', which torch does not know"):
        allstep.init()
    with allstep.init(device="cpu") as world:
        assert world.device.type == "cpu"
