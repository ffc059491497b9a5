"""What DeviceStats reads, how ranks have one number of it, and what happens where a library is missing."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import pytest
import torch

from allstep import Alone, Engine
from allstep.engine.registry import HandlerSlot
from allstep.errors import MissingExtraError
from allstep.handlers import DeviceStats
from allstep.handlers.device_readings import device_reader
from allstep.testing import run_ranks
from allstep.world import World
from tests.engine.recording import nothing

psutil = pytest.importorskip("psutil")


def test_the_host_is_read_each_so_many_iterations() -> None:
    trainer = Engine(nothing, coordinator=Alone())
    stats = DeviceStats(every=5).attach(trainer)
    metrics = trainer.run([0] * 12).metrics
    assert set(stats.values) == {"cpu_percent", "memory_gib", "host_memory_percent"}
    assert 0.05 < stats.values["memory_gib"] < psutil.virtual_memory().total / 2**30
    assert 0 < metrics["device/host_memory_percent"] <= 100
    assert set(metrics) == {f"device/{name}" for name in stats.values}


def test_an_epoch_without_a_reading_has_no_numbers() -> None:
    trainer = Engine(nothing, coordinator=Alone())
    DeviceStats(every=5).attach(trainer)
    assert trainer.run([0] * 3).metrics == {}


def test_iterations_in_between_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Engine(nothing, coordinator=Alone())
    DeviceStats(every=100).attach(trainer)
    calls: list[Any] = []
    call = HandlerSlot.call
    monkeypatch.setattr(HandlerSlot, "call", lambda self, *rest: (calls.append(self.event), call(self, *rest))[1])
    trainer.run([0] * 99)
    assert [event.name for event in calls] == ["STARTED", "ITERATION_COMPLETED", "EPOCH_COMPLETED"]


def _over_ranks(world: World) -> tuple[dict[str, Any], dict[str, float]]:
    trainer = Engine(nothing)
    stats = DeviceStats(every=4, prefix="").attach(trainer)
    stats._host = lambda: {"memory_gib": 1.0 + world.rank, "cpu_percent": 100.0 * trainer.state.iteration}
    if world.rank:  # only one of the two has a device that tells of itself
        stats._host = lambda: {"memory_gib": 2.0, "cpu_percent": 50.0, "device_watts": 300.0}
    return trainer.run([0] * 8).metrics, stats.values


@pytest.mark.slow
def test_over_two_ranks_there_is_one_number_of_both() -> None:
    (first, own), (second, other) = run_ranks(_over_ranks, 2)
    # The most of memory, the mean of what changes: 600 and 50 percent, and what one rank has.
    assert first == second == {"memory_gib": 1.5, "cpu_percent": 325.0, "device_watts": 300.0}
    assert (own["memory_gib"], other["memory_gib"]) == (1.0, 2.0)


class FakeLibrary(types.ModuleType):
    """NVIDIA's management library, for a device that does not tell its temperature."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-abc"
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return types.SimpleNamespace(gpu=87)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return types.SimpleNamespace(used=3 << 30)

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        raise self.NVMLError

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 250_000


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 2 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    return torch.device("cuda", 0)


def test_a_cuda_device_tells_what_it_can(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary("pynvml"))
    assert device_reader(cuda)() == {
        "device_allocated_gib": 2.0,
        "device_percent": 87.0,
        "device_memory_gib": 3.0,
        "device_watts": 250.0,
    }


def test_without_the_management_library_torch_tells_its_memory(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert device_reader(cuda)() == {"device_allocated_gib": 2.0}


def test_without_psutil_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'allstep[stats]'")):
        DeviceStats()


def test_a_number_of_iterations_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every is 0"):
        DeviceStats(every=0)
