"""How many workers `auto` means: which CUDA devices this process may use, found without importing torch.

Contract: `visible_devices` decides from an environment mapping and a probe of the hardware, which it calls only when
the answer depends on it; `probe_hardware` is that probe on a real machine and never raises. CUDA_VISIBLE_DEVICES means
what it means to CUDA: entries are indexes or identifiers, the first one that names nothing ends the list, and a
device named twice makes the list worth nothing. A process can use one MIG instance only, so where devices are MIG
instances each worker must be shown its own (`Devices.apart`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from allstep.protocol.foreign_text import one_line

_PROBE_S = 30
_GPU = re.compile(r"^GPU \d+: .*\(UUID: (GPU-[0-9a-fA-F-]+)\)", re.MULTILINE)
_MIG = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)\s]+)\)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CudaHardware:
    """What a probe found: the GPUs in order (their UUIDs, or "" where only their number is known) and MIG instances.

    `doubt` says why this may be less than there is.
    """

    gpus: tuple[str, ...] = ()
    mig: tuple[str, ...] = ()
    doubt: str = ""


@dataclass(frozen=True, slots=True)
class Devices:
    """The CUDA devices that workers may use, as CUDA_VISIBLE_DEVICES would name them.

    `apart` is true where each worker must be shown its own device alone; `doubt` says why there may be more.
    """

    names: tuple[str, ...] = ()
    apart: bool = False
    doubt: str = ""


def visible_devices(environ: Mapping[str, str], probe: Callable[[], CudaHardware]) -> Devices:
    """Return the devices that a CUDA process started with `environ` could use."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    entries = None if listed is None else [entry.strip() for entry in listed.split(",")]
    # The probe takes a tenth of a second or more, so it is not made where the answer is known.
    if entries is not None and not _could_name_a_device(entries[0]):
        return Devices()
    hardware = probe()
    if not hardware.gpus:
        return Devices(doubt=hardware.doubt)
    if entries is None:
        names = hardware.mig or tuple(str(index) for index in range(len(hardware.gpus)))
    else:
        names = _resolved(entries, hardware)
    # A CUDA process that sees several MIG instances uses the first one only.
    return Devices(names, any(name.startswith("MIG-") for name in names), hardware.doubt)


def device_environment(devices: Devices, local_rank: int, workers: int) -> dict[str, str]:
    """Variables that show a worker its own device, where it must not see the others."""
    if not devices.apart or workers > len(devices.names):  # with too few instances workers have to share
        return {}
    return {"CUDA_VISIBLE_DEVICES": devices.names[local_rank]}


def _could_name_a_device(entry: str) -> bool:
    return entry.isdecimal() or entry.startswith(("GPU-", "MIG-"))


def _resolved(entries: list[str], hardware: CudaHardware) -> tuple[str, ...]:
    names: list[str] = []
    for entry in entries:
        if entry.isdecimal():
            exists = int(entry) < len(hardware.gpus)
        elif entry.startswith("GPU-"):
            exists = "" in hardware.gpus or any(uuid.startswith(entry) for uuid in hardware.gpus)
        else:
            exists = entry.startswith("MIG-")  # its name in the variable may be of an older form than the listing's
        if not exists:
            break  # as CUDA does: what follows an unknown entry is ignored
        names.append(entry)
    return tuple(names) if len(set(names)) == len(names) else ()


def parse_listing(text: str) -> CudaHardware:
    """Read what `nvidia-smi -L` prints."""
    return CudaHardware(tuple(_GPU.findall(text)), tuple(_MIG.findall(text)))


def probe_hardware() -> CudaHardware:
    """Ask the driver's own tool, and where that is missing look at what the driver shows of itself."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_S,
            check=False,
        )
    except OSError:
        return CudaHardware(("",) * _devices_shown())
    except subprocess.TimeoutExpired:
        return _doubted(f"nvidia-smi did not answer in {_PROBE_S} s")
    if listing.returncode:
        said = next(filter(None, (line.strip() for line in (listing.stderr + listing.stdout).splitlines())), "nothing")
        return _doubted(f"nvidia-smi failed with exit code {listing.returncode} and said: {one_line(said)}")
    return parse_listing(listing.stdout)


def _doubted(problem: str) -> CudaHardware:
    """What is known where the driver's tool is there and does not answer."""
    shown = _devices_shown()
    return CudaHardware(("",) * shown, doubt=f"{problem}. The driver shows {shown} GPU{'' if shown == 1 else 's'}")


def _devices_shown() -> int:
    """How many devices the driver shows in its file system, where the driver's tool is not installed (a container)."""
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        pass
    try:
        return sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    except OSError:
        return 0
