"""`DeviceStats`: how busy and how full the processors, memory and devices of all ranks are.

Contract: attached on every rank alike. Each so many iterations a rank reads its own numbers, which `values` has. At an
epoch's end `state.metrics` has the mean over the ranks, under a prefix: of what was read in the epoch the mean, and of
memory the most. The sums over ranks ride in the votes that ranks hold anyway. In other iterations it costs nothing; a
reading takes a fraction of a millisecond and waits for no device.

psutil tells of the host. torch tells of its own memory on a CUDA device, and NVIDIA's management library of the whole
device. Where that library is not there, as on other makers' devices, its numbers are left out, and those of the ranks
that have it are the mean over these. What can go wrong: psutil is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from allstep.engine import Engine, Events
from allstep.engine.events import is_count
from allstep.errors import ArgumentError, MissingExtraError
from allstep.world import World

_GIB = 1 << 30
_SCALE = 1000  # numbers travel as thousandths

_HOST = ("cpu_percent", "memory_gib", "host_memory_percent")
_DEVICE = ("device_allocated_gib", "device_percent", "device_memory_gib", "device_celsius", "device_watts")

Reading = dict[str, float]


class DeviceStats:
    """Reads how busy and full processors, memory and devices are.

    Args:
        every: iterations between readings.
        prefix: what stands before the names in `state.metrics`.

    Attributes:
        values: this rank's last reading: "cpu_percent" of one core and "memory_gib" of this process,
            "host_memory_percent" of the host; on CUDA devices "device_allocated_gib" by torch, and of the whole device
            "device_percent" of the time busy, "device_memory_gib", "device_celsius" and "device_watts".

    Raises:
        MissingExtraError: psutil is not installed.
        ArgumentError: every is no int of at least 1.
    """

    def __init__(self, every: int = 100, *, prefix: str = "device/") -> None:
        if not is_count(every, least=1):
            raise ArgumentError(f"every is {every!r}; it must be an int of at least 1")
        self.every = every
        self.prefix = prefix
        self.values: Reading = {}
        self._host = _host_reader()
        self._device: Callable[[], Reading] | None = None
        self._of_epoch: dict[str, list[float]] = {}
        self._totals: dict[str, int] = {}

    def attach(self, engine: Engine) -> DeviceStats:
        """Read in the runs of `engine`. Returns self."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._take)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)
        # The same numbers on all ranks, whatever each of them can read, and how many ranks have read each.
        for name in (*_HOST, *_DEVICE):
            summed = engine.extension.sum_over_ranks
            summed(f"{name} of DeviceStats", partial(self._number, name), partial(self._totals.__setitem__, name))
            ranks = f"ranks with {name}"
            summed(ranks, partial(self._has, name), partial(self._totals.__setitem__, ranks))
        return self

    def _start(self) -> None:
        world = World.current()
        device = None if world is None else world.device
        if device is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device_reader(device) if device is not None and device.type == "cuda" else None
        self._of_epoch.clear()

    def _take(self) -> None:
        self.values = self._host() | ({} if self._device is None else self._device())
        for name, value in self.values.items():
            self._of_epoch.setdefault(name, []).append(value)

    def _number(self, name: str) -> int:
        taken = self._of_epoch.get(name)
        if not taken:
            return 0
        return round(_SCALE * (max(taken) if name.endswith("_gib") else sum(taken) / len(taken)))

    def _has(self, name: str) -> int:
        return int(name in self._of_epoch)

    def _report(self, engine: Engine) -> None:
        for name in (*_HOST, *_DEVICE):
            if ranks := self._totals.get(f"ranks with {name}"):
                engine.state.metrics[f"{self.prefix}{name}"] = self._totals[name] / _SCALE / ranks
        self._of_epoch.clear()


def _host_reader() -> Callable[[], Reading]:
    try:
        import psutil
    except ImportError as error:
        raise MissingExtraError("DeviceStats needs psutil: pip install 'allstep[stats]'") from error
    process = psutil.Process()
    process.cpu_percent()  # the first call says 0 and begins the time that the next is about

    def read() -> Reading:
        return {
            "cpu_percent": process.cpu_percent(),
            "memory_gib": process.memory_info().rss / _GIB,
            "host_memory_percent": psutil.virtual_memory().percent,
        }

    return read


def device_reader(device: torch.device) -> Callable[[], Reading]:
    """Reads a CUDA device; without NVIDIA's management library only what torch tells."""
    library = _management_library(device)

    def read() -> Reading:
        found = {"device_allocated_gib": torch.cuda.memory_allocated(device) / _GIB}
        return found if library is None else found | library()

    return read


def _management_library(device: torch.device) -> Callable[[], Reading] | None:
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        # By its own number: CUDA_VISIBLE_DEVICES gives devices other places than the library knows them by.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # not installed, no driver, or a part of a device that it does not know by this number
        return None
    readers: dict[str, Callable[[], float]] = {
        "device_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "device_memory_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / _GIB,
        "device_celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "device_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }

    def read() -> Reading:
        return {name: value for name, each in readers.items() if (value := _or_none(each, pynvml)) is not None}

    return read


def _or_none(read: Callable[[], float], pynvml: Any) -> float | None:
    try:
        return float(read())
    except pynvml.NVMLError:  # some devices do not tell everything
        return None
