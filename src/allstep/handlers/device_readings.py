"""What the host, a process and a device tell of themselves: how busy they are, and how full.

Contract: each function here gives a function that reads; a reading takes a fraction of a millisecond and waits for no
device. psutil tells of the host. torch tells of its own memory on an accelerator, where it keeps account of that, and
NVIDIA's management library of a whole CUDA device. Where that library is not there, as on other makers' devices, its
numbers are left out. What can go wrong: psutil is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from allstep.cuda import device_uuid
from allstep.errors import MissingExtraError
from allstep.world import World

GIB = 1 << 30
HOST = ("cpu_percent", "memory_gib", "host_memory_percent")
DEVICE = ("device_allocated_gib", "device_percent", "device_memory_gib", "device_celsius", "device_watts")

_UNREAD = ("cpu", "xla")

Reading = dict[str, float]


def host_reader() -> Callable[[], Reading]:
    """Reads the host and this process: the numbers of `HOST`.

    Raises:
        MissingExtraError: psutil is not installed.
    """
    try:
        import psutil
    except ImportError as error:
        raise MissingExtraError("DeviceStats needs psutil: pip install 'allstep[stats]'") from error
    process = psutil.Process()
    process.cpu_percent()  # the first call says 0 and begins the time that the next is about

    def read() -> Reading:
        return {
            "cpu_percent": process.cpu_percent(),
            "memory_gib": process.memory_info().rss / GIB,
            "host_memory_percent": psutil.virtual_memory().percent,
        }

    return read


def own_device_reader() -> Callable[[], Reading]:
    """Reads the World's device, or the accelerator that is current; nothing where there is none, or where it is XLA."""
    world = World.current()
    device = None if world is None else world.device
    if device is None and (kind := torch.accelerator.current_accelerator(check_available=True)) is not None:
        device = torch.device(kind.type, torch.accelerator.current_device_index())
    return dict if device is None or device.type in _UNREAD else device_reader(device)


def device_reader(device: torch.device) -> Callable[[], Reading]:
    """Reads an accelerator: the numbers of `DEVICE`, without NVIDIA's management library only what torch tells."""
    library = _management_library(device) if device.type == "cuda" else None
    counts = _counts_memory(device)

    def read() -> Reading:
        found = {"device_allocated_gib": torch.accelerator.memory_allocated(device) / GIB} if counts else {}
        return found if library is None else found | library()

    return read


def _counts_memory(device: torch.device) -> bool:
    try:
        torch.accelerator.memory_allocated(device)
    except (RuntimeError, ValueError):  # its allocator keeps no account, or torch's accelerator is another one
        return False
    return True


def _management_library(device: torch.device) -> Callable[[], Reading] | None:
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        # By its own number: CUDA_VISIBLE_DEVICES gives devices other places than the library knows them by.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{device_uuid(device)}")
    except Exception:  # not installed, no driver, or a part of a device that it does not know by this number
        return None
    readers: dict[str, Callable[[], float]] = {
        "device_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "device_memory_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
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
