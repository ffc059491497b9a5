"""How many workers `auto` means: which CUDA devices this process may use, found without importing torch.

Contract: `visible_devices` decides from an environment mapping and a probe of the hardware, which it calls only when
the answer depends on it; `probe_hardware` is that probe on a real machine and never raises. CUDA_VISIBLE_DEVICES means
what it means to CUDA: entries are indexes or identifiers, the first one that names nothing ends the list, and a
device named twice makes the list worth nothing. A process can use one MIG instance only, and sees no whole GPU beside
it, so where there is one each worker must be shown its own device (`Devices.apart`). NCCL takes one rank for each GPU,
sliced or not: `auto` means one worker for each (`Devices.count`), and what is left over is said (`Devices.unused`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from allstep.protocol.foreign_text import one_line

_PROBE_S = 30
_GPU = re.compile(r"^GPU \d+: .*\(UUID: (GPU-[0-9a-fA-F-]+)\)")
_MIG = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)\s]+)\)")
_OLDER_MIG = re.compile(r"MIG-(GPU-[0-9a-fA-F-]+)/")


@dataclass(frozen=True, slots=True)
class CudaHardware:
    """What a probe found: the GPUs in order (their UUIDs, or "" where only their number is known) and MIG instances.

    `parents` has the index of each instance's GPU, and `doubt` says why this may be less than there is.
    """

    gpus: tuple[str, ...] = ()
    mig: tuple[str, ...] = ()
    parents: tuple[int, ...] = ()
    doubt: str = ""


@dataclass(frozen=True, slots=True)
class Devices:
    """The CUDA devices that workers may use, as CUDA_VISIBLE_DEVICES would name them.

    `apart` is true where each worker must be shown its own device alone; `doubt` says why there may be more. The last
    `sharing` of the names are MIG instances of a GPU that an earlier name is of.
    """

    names: tuple[str, ...] = ()
    apart: bool = False
    doubt: str = ""
    sharing: int = 0

    @property
    def count(self) -> int:
        """How many workers there can be with a GPU each."""
        return len(self.names) - self.sharing

    @property
    def unused(self) -> str:
        """What a worker for each GPU leaves unused, in words; empty where that is nothing."""
        if not self.sharing:
            return ""
        every = len(self.names)
        return (
            f"{self.sharing} of {every} MIG instances and GPUs stay unused, since NCCL takes one rank for each GPU; "
            f'--nproc {every} with backend="gloo" uses them all'
        )


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
    names = _every(hardware) if entries is None else _resolved(entries, hardware)
    if not any(name.startswith("MIG-") for name in names):
        return Devices(names, doubt=hardware.doubt)
    seen: set[str] = set()
    first: list[str] = []
    for name in names:
        parent = _parent(name, hardware)
        first += [] if parent in seen else [name]
        seen.add(parent)
    others = [name for name in names if name not in first]
    return Devices((*first, *others), True, hardware.doubt, len(others))


def _every(hardware: CudaHardware) -> tuple[str, ...]:
    """All devices: the instances of the GPUs that are sliced, and the other GPUs whole."""
    if not hardware.mig:
        return tuple(str(index) for index in range(len(hardware.gpus)))
    parents = hardware.parents or (0,) * len(hardware.mig)
    names: list[str] = []
    for index, gpu in enumerate(hardware.gpus):
        instances = [name for name, parent in zip(hardware.mig, parents, strict=True) if parent == index]
        names += instances or [gpu or str(index)]
    return tuple(names)


def _parent(name: str, hardware: CudaHardware) -> str:
    """What tells the GPU of a device from others; the device's own name where nothing more is known of it."""
    if name in hardware.mig:
        return f"GPU {hardware.parents[hardware.mig.index(name)] if hardware.parents else 0}"
    older = _OLDER_MIG.match(name)  # which has the GPU's name in it
    gpu = older[1] if older else name
    found = [index for index, uuid in enumerate(hardware.gpus) if uuid and uuid.startswith(gpu)]
    return f"GPU {found[0] if found else int(gpu) if gpu.isdecimal() else gpu}"


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
    gpus: list[str] = []
    mig: list[str] = []
    parents: list[int] = []
    for line in text.splitlines():
        if found := _GPU.match(line):
            gpus.append(found[1])
        elif gpus and (found := _MIG.match(line)):
            mig.append(found[1])
            parents.append(len(gpus) - 1)
    return CudaHardware(tuple(gpus), tuple(mig), tuple(parents))


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
