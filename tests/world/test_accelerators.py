"""Accelerators beside CUDA, over a stand-in for those of another maker: four of them, which compute on the host."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import Metric

import allstep
from allstep.checkpoint import Checkpoint
from allstep.engine import Engine
from allstep.errors import WorldError
from allstep.metrics import Mean, Metrics
from allstep.placement import Placement, Rendezvous
from allstep.testing import run_ranks
from allstep.trainers import create_supervised_trainer
from allstep.world import World
from allstep.world.device import (
    VisibleHardware,
    choose_backend,
    choose_device,
    choose_transport,
    unused_devices,
    visible_hardware,
)
from tests.world.four_devices import NAME, four_devices

FOUR = VisibleHardware(accelerator="npu", accelerators=4)


def chosen(world: World) -> tuple[str, str, str]:
    """Device, backend and transport that `init` would choose for a rank of a process with four devices."""
    four_devices()
    device = choose_device(world.placement, visible_hardware())
    backend = choose_backend(device)
    return str(device), backend, str(choose_transport(device, backend))


def supervised(world: World, folder: Path, epochs: int) -> tuple[Engine, list[torch.Tensor]]:
    """A trainer that has trained for so many epochs or gone on from the folder, with dropout, and its parameters."""
    world.seed_everything(5)
    model = world.wrap(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy, clip_norm=1.0)
    Metrics({"loss": Mean()}).attach(trainer)
    Checkpoint(folder, every="epoch").attach(trainer).resume()
    data = TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3)
    trainer.run(world.loader(data, batch_size=4, shuffle=True), max_epochs=epochs)
    return trainer, [each.detach() for each in model.parameters()]


def trained_on_a_device(world: World, folder: Path) -> dict[str, object]:
    """What becomes of an unbroken run and of one that goes on, in a world of one that takes the first device."""
    world.close()
    devices = four_devices()
    with allstep.init() as opened:
        found: dict[str, object] = {"device": str(opened.device)}
        trainer, unbroken = supervised(opened, folder / "unbroken", 2)
        found["on the device"] = {str(each.device) for each in unbroken}
        loss = trainer.state.metrics["loss"]
        assert opened.loader(TensorDataset(torch.ones(2)), batch_size=1).pin_memory is False
    with allstep.init():
        supervised(World.current(), folder / "broken", 1)
    devices.manual_seed_all(77)
    with allstep.init():
        again, gone_on = supervised(World.current(), folder / "broken", 2)
    found["bits"] = all(torch.equal(a, b) for a, b in zip(unbroken, gone_on, strict=True))
    found["loss"] = float(again.state.metrics["loss"]) == float(loss)
    return found


class Drawing(Metric):
    """Adds up what it is given, and draws a number when it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(1), dist_reduce_fx="sum")
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, value: torch.Tensor) -> None:
        """Take a tensor in."""
        self.total += value.sum()
        self.seen.append(value)

    def compute(self) -> torch.Tensor:
        """The total, how much was seen, and a draw from the device."""
        seen = torch.cat(self.seen) if isinstance(self.seen, list) else self.seen
        return torch.cat([self.total, seen.sum().reshape(1), torch.rand(1, device=self.total.device)])


def drawing(folder: Path, epochs: int) -> tuple[World, list[float], dict[str, object]]:
    """A run whose steps draw from the rank's device: the World, the draws, and what is known at its end."""
    opened = allstep.init(seed=3)
    module = opened.wrap(nn.BatchNorm1d(2, affine=False))
    draws: list[float] = []

    def step(engine: Engine, batch: float) -> dict[str, torch.Tensor]:
        draws.append(torch.rand(1, device=opened.device).item())
        return {"x": module.running_mean.add_(batch) + opened.rank}

    trainer = Engine(step)
    Metrics({"drawing": Drawing().to(opened.device)}).attach(trainer, {"drawing": lambda output: output["x"]})
    Checkpoint(folder, {"module": module, "trainer": trainer}, every="epoch").attach(trainer).resume()
    trainer.run([1.0, 2.0], max_epochs=epochs)
    mean = module.running_mean
    metric = trainer.state.metrics["drawing"]
    known = {"mean": mean.cpu().tolist(), "place": str(mean.device), "metric": metric.cpu().tolist()}
    return opened, draws, known


def over_two_devices(world: World, folder: Path) -> dict[str, object]:
    """What two ranks find, each on its own device: collectives, a metric over both, a run that goes on."""
    world.close()
    devices = four_devices()
    opened, draws, known = drawing(folder / "whole", 2)
    summed = opened.all_reduce(torch.ones(3, device=opened.device))
    found = {**known, "summed": (summed.cpu().tolist(), str(summed.device)), "backend": opened.backend}
    opened.close()
    drawing(folder / "broken", 1)[0].close()
    devices.manual_seed_all(99)
    opened, again, known_again = drawing(folder / "broken", 2)
    opened.close()
    found["goes on"] = (again == draws[2:], known_again == known)
    return found


def refused(world: World) -> tuple[str, ...]:
    """What is said of devices that are not there, where four of another maker are."""
    world.close()
    four_devices()
    said = []
    for asked in (f"{NAME}:9", "cuda", "xpu"):
        with pytest.raises(WorldError) as caught:
            allstep.init(device=asked)
        said.append(str(caught.value))
    return tuple(said)


def test_each_rank_takes_its_own_of_four_devices():
    assert run_ranks(chosen, 2) == [("fakegpu:0", "gloo", "cpu"), ("fakegpu:1", "gloo", "cpu")]


def test_a_run_on_one_of_them_goes_on_to_the_last_bit(tmp_path):
    (found,) = run_ranks(trained_on_a_device, 1, tmp_path)
    assert found == {"device": "fakegpu:0", "on the device": {"fakegpu:0"}, "bits": True, "loss": True}


@pytest.mark.slow
def test_two_ranks_have_metrics_and_saves_each_on_its_own_device(tmp_path):
    first, second = run_ranks(over_two_devices, 2, tmp_path)
    assert (first["place"], second["place"]) == ("fakegpu:0", "fakegpu:1")
    assert first["backend"] == "gloo"
    assert second["summed"] == ([2.0] * 3, "fakegpu:1")
    assert first["mean"] == [6.0, 6.0]
    assert first["metric"] == second["metric"]  # the draw too
    assert first["metric"][:2] == [44.0, 44.0]
    assert first["goes on"] == second["goes on"] == (True, True)


@pytest.mark.slow
def test_devices_that_are_not_there_are_refused_with_what_is():
    ((too_many, cuda, xpu),) = run_ranks(refused, 1)
    assert "'fakegpu:9', but this process sees 4 FAKEGPU devices, from 0" in too_many
    assert "sees no CUDA device" in cuda
    assert "cpu, fakegpu (4)" in cuda
    assert "XPU is not available in this process, which has cpu, fakegpu (4)" in xpu


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


@pytest.mark.parametrize(
    ("device", "backend", "transport"),
    [
        ("xpu:2", "xccl", "xpu:2"),
        ("mps", "gloo", "cpu"),
        ("cuda:1", "nccl", "cuda:1"),
        ("privateuseone", "gloo", "cpu"),
    ],
)
def test_tensors_go_over_the_backend_of_their_device(device, backend, transport):
    device = torch.device(device)
    assert choose_backend(device) == backend
    assert choose_transport(device, backend) == torch.device(transport)


def test_a_backend_that_a_maker_registers_carries_tensors_of_its_devices(monkeypatch):
    monkeypatch.setitem(dist.Backend.default_device_backend_map, "privateuseone", "hccl")
    monkeypatch.setitem(dist.Backend.backend_capability, "hccl", ["privateuseone"])
    device = torch.device("privateuseone", 3)
    assert choose_backend(device) == "hccl"
    assert choose_transport(device, "hccl") == device


def test_more_ranks_than_accelerators_are_refused():
    place = third_of(3)
    with pytest.raises(WorldError, match="local rank 2 of 3 sees 2 XPU devices"):
        choose_device(place, VisibleHardware(accelerator="xpu", accelerators=2))


def test_what_is_here_and_not_used_is_one_line():
    cpu = torch.device("cpu")
    assert unused_devices(cpu, FOUR).endswith("devices that it does not use: 4 of npu")
    assert unused_devices(cpu, VisibleHardware()) == ""
    assert unused_devices(torch.device("cuda", 0), VisibleHardware(cuda=4)) == ""
    both = VisibleHardware(cuda=2, accelerator="npu", accelerators=4)
    assert unused_devices(torch.device("cuda", 1), both) == (
        "the device is cuda:1, and this process also sees devices that it does not use: 4 of npu"
    )
    assert unused_devices(cpu, VisibleHardware(pjrt="TPU")).endswith("use: TPU, which PJRT_DEVICE names")
    assert unused_devices(torch.device("xla", 0), VisibleHardware(cuda=2, pjrt="CUDA")) == ""


def test_it_is_said_where_a_world_opens(monkeypatch, caplog):
    monkeypatch.setattr("allstep.world.initialization.visible_hardware", lambda: VisibleHardware(cuda=2))
    with caplog.at_level(logging.INFO, "allstep.world"), allstep.init(device="cpu"):
        assert [each.message for each in caplog.records] == [
            unused_devices(torch.device("cpu"), VisibleHardware(cuda=2))
        ]
