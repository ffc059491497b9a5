"""Accelerators beside CUDA, over torch's stand-in for a device of another maker: four of them that compute nothing."""

from __future__ import annotations

import logging

import pytest
import torch

import allstep
from allstep.checkpoint.rng import capture, restore
from allstep.errors import WorldError
from allstep.placement import Placement, Rendezvous
from allstep.testing import run_ranks
from allstep.world.device import (
    VisibleHardware,
    choose_backend,
    choose_device,
    choose_transport,
    unused_devices,
    visible_hardware,
)

FOUR = VisibleHardware(accelerator="npu", accelerators=4)


def four_devices() -> None:
    """Make this process one that sees four devices of the type "fakegpu". It cannot be undone."""
    from torch.utils import backend_registration

    class Devices(backend_registration._DummyBackendModule):
        def __init__(self) -> None:
            self.generator = torch.Generator()

        def device_count(self) -> int:
            return 4

        def manual_seed_all(self, seed: int) -> None:
            self.generator.manual_seed(seed)

        def get_rng_state(self, device: object) -> torch.Tensor:
            return self.generator.get_state()

        def set_rng_state(self, state: torch.Tensor, device: object) -> None:
            self.generator.set_state(state)

    backend_registration._setup_privateuseone_for_python_backend("fakegpu", Devices())


def chosen(world: allstep.World) -> tuple[str, str, str]:
    """Device, backend and transport that `init` would choose for a rank of a process with four devices."""
    four_devices()
    device = choose_device(world.placement, visible_hardware())
    backend = choose_backend(device)
    return str(device), backend, str(choose_transport(device, backend))


def opened_over_four(world: allstep.World) -> dict[str, object]:
    """What a world of one finds on such a device."""
    world.close()
    four_devices()
    with allstep.init(seed=5) as opened:
        generator = torch.get_device_module("fakegpu").generator
        found: dict[str, object] = {"device": str(opened.device), "seeded": generator.initial_seed() == 5}
        kept = capture()
        drawn = torch.rand(3, generator=generator).tolist()
        restore(kept)
        found["same draws"] = torch.rand(3, generator=generator).tolist() == drawn
    with pytest.raises(WorldError, match="sees 4 FAKEGPU devices, from 0"):
        allstep.init(device="fakegpu:9")
    return found


def test_each_rank_takes_its_own_of_four_devices():
    assert run_ranks(chosen, 2) == [("fakegpu:0", "gloo", "cpu"), ("fakegpu:1", "gloo", "cpu")]


def test_a_world_of_one_seeds_and_restores_the_generator_of_its_device():
    assert run_ranks(opened_over_four, 1) == [{"device": "fakegpu:0", "seeded": True, "same draws": True}]


def third_of(ranks: int) -> Placement:
    """Rank 2 of so many on one host."""
    there = Rendezvous("here", (1,))
    return Placement("torchrun", rank=2, world_size=ranks, local_rank=2, local_world_size=ranks, rendezvous=there)


@pytest.mark.parametrize(("asked", "device"), [(None, "xpu:2"), ("xpu", "xpu:2"), ("xpu:1", "xpu:1"), ("cpu", "cpu")])
def test_an_accelerator_is_chosen_by_local_rank(asked, device):
    place = third_of(4)
    hardware = VisibleHardware(accelerator="xpu", accelerators=4)
    assert choose_device(place, hardware, asked) == torch.device(device)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("npu", r"'npu', which torch does not know; this process has cpu, cuda \(2\)\. A device of another maker"),
        ("xpu", r"XPU is not available in this process, which has cpu, cuda \(2\)"),
        ("meta", "META is not available"),
    ],
)
def test_a_device_that_is_not_here_lists_what_is(asked, message):
    with pytest.raises(WorldError, match=message):
        choose_device(Placement("alone"), VisibleHardware(cuda=2), asked)


def test_more_ranks_than_accelerators_are_refused():
    place = third_of(3)
    with pytest.raises(WorldError, match="local rank 2 of 3 sees 2 XPU devices"):
        choose_device(place, VisibleHardware(accelerator="xpu", accelerators=2))


def test_what_is_here_and_not_used_is_one_line():
    cpu = torch.device("cpu")
    assert unused_devices(cpu, FOUR).endswith("devices that it does not use: 4 of npu")
    assert unused_devices(cpu, VisibleHardware()) == ""
    assert unused_devices(torch.device("cuda", 0), VisibleHardware(cuda=4)) == ""


def test_it_is_said_where_a_world_opens(monkeypatch, caplog):
    monkeypatch.setattr("allstep.world.initialization.visible_hardware", lambda: VisibleHardware(cuda=2))
    with caplog.at_level(logging.INFO, "allstep.world"), allstep.init(device="cpu"):
        assert [each.message for each in caplog.records] == [
            unused_devices(torch.device("cpu"), VisibleHardware(cuda=2))
        ]
