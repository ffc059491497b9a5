"""Whether torch can be imported, and whether its build fits this machine's devices and driver.

Contract: torch is asked in a process of its own, started as a rank would be. An import that crashes, or that takes too
long, is then a finding and not the end of this process. `judge_torch` decides from what it answered and from what the
kernel shows of devices.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from allstep.host_checks.finding import Host, HostFinding, ask, graded
from allstep.protocol.foreign_text import one_line

LONG_S = 30.0
"""Seconds in which torch is imported from any disk that can be worked with."""

INSTALL = "pip install torch --index-url https://download.pytorch.org/whl/"

_MARK = "allstep-torch "
_QUESTIONS = f"""
import ctypes, importlib.metadata, json, sys, time
answer = {{"copies": sorted({{f"{{each.version}} in {{each.locate_file('')}}" for each in
    importlib.metadata.distributions(name="torch")}})}}
began = time.monotonic()
import torch
answer["seconds"] = time.monotonic() - began
answer.update(version=torch.__version__, file=torch.__file__ or "", cuda=torch.version.cuda, hip=torch.version.hip)
if torch.version.cuda or torch.version.hip:
    answer["available"] = torch.cuda.is_available()
    answer["devices"] = torch.cuda.device_count()
    if not answer["available"]:
        try:
            torch.cuda.init()
        except Exception as error:
            answer["why"] = str(error)
    try:
        answer["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:
        pass
    if torch.version.cuda:
        try:
            cuda, number, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
            if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
                answer["driver"] = number.value
            answer["arches"] = torch.cuda.get_arch_list()
            answer["capabilities"] = []
            for index in range(answer["devices"] if cuda.cuInit(0) == 0 else 0):  # without a context on any of them
                pair = []
                for attribute in (75, 76):  # major and minor compute capability
                    if cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
                        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
                        pair.append(number.value)
                answer["capabilities"].append(pair)
        except Exception:
            pass
print({_MARK!r} + json.dumps(answer))
"""


@dataclass(frozen=True, slots=True)
class TorchAnswer:
    """What torch says of itself.

    Args:
        version: as `torch.__version__`.
        file: what was imported.
        seconds: that the import took.
        copies: each installed torch, with its version and folder.
        cuda: the version of CUDA that it was built for, or None.
        hip: the version of ROCm, or None.
        available: whether it can use a device.
        devices: how many it counts.
        why: what it says where it can use none.
        nccl: the version of NCCL in it.
        driver: the newest CUDA that the driver can serve, as CUDA counts (12040 is 12.4); 0 where there is no driver.
        arches: what it has code for, such as "sm_90" or "compute_120".
        capabilities: major and minor compute capability of each device, as far as they are known.
    """

    version: str
    file: str = ""
    seconds: float = 0.0
    copies: list[str] = field(default_factory=list)
    cuda: str | None = None
    hip: str | None = None
    available: bool = False
    devices: int = 0
    why: str = ""
    nccl: str = ""
    driver: int = 0
    arches: list[str] = field(default_factory=list)
    capabilities: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class KernelDevices:
    """How many devices the kernel shows: NVIDIA's with a driver, NVIDIA's on the bus, and AMD's with a driver."""

    nvidia: int = 0
    nvidia_on_bus: int = 0
    amd: int = 0


def kernel_devices(host: Host) -> KernelDevices:
    """Count devices by what the kernel shows, without any tool of a driver."""
    bus = [f"sys/bus/pci/devices/{name}" for name in host.names("sys/bus/pci/devices")]
    displays = [each for each in bus if host.read(f"{each}/class").startswith("0x03")]
    nodes = host.names("sys/class/kfd/kfd/topology/nodes")
    return KernelDevices(
        nvidia=len(host.names("proc/driver/nvidia/gpus")),
        nvidia_on_bus=sum(host.read(f"{each}/vendor") == "0x10de" for each in displays),
        # A node without an id is a processor.
        amd=sum(host.read(f"sys/class/kfd/kfd/topology/nodes/{node}/gpu_id") not in ("", "0") for node in nodes),
    )


def check_torch(host: Host) -> Iterator[HostFinding]:
    """Import torch in another process and ask it."""
    said = ask([sys.executable, "-c", _QUESTIONS], host)
    line = next((each for each in said.out.splitlines()[::-1] if each.startswith(_MARK)), "")
    if line:
        answer = TorchAnswer(**json.loads(line.removeprefix(_MARK)))
        yield from judge_torch(answer, kernel_devices(host), host.environ)
    elif "did not answer" in said.problem:
        text = f"importing torch takes more than {host.within:g} s"
        remedy = (
            "Try again with --timeout 60: the first import from a slow disk takes long. If it stays so, move the "
            "environment to a local disk"
        )
        yield HostFinding("torch", graded(bad=host.within >= LONG_S), text, remedy)
    else:
        text = f"importing torch fails: {said.problem or 'it ended the process'}"
        remedy = f"Run `{sys.executable} -c 'import torch'` to see all; pip install --force-reinstall torch mends most"
        yield HostFinding("torch", "bad", text, remedy)


def judge_torch(answer: TorchAnswer, kernel: KernelDevices, environ: Mapping[str, str]) -> Iterator[HostFinding]:
    """Compare torch's build with the devices and the driver that are there."""
    if len(answer.copies) > 1:
        text = f"several are installed: {'; '.join(answer.copies)}; {answer.file} is what Python imports"
        yield HostFinding("torch", "warning", text, "Uninstall all but one: pip uninstall torch, until none is left")
    if answer.cuda:
        yield _judge_cuda(answer, kernel, environ)
    elif answer.hip:
        yield _judge_rocm(answer, kernel)
    elif kernel.nvidia and environ.get("CUDA_VISIBLE_DEVICES") != "":
        text = (
            f"torch {answer.version} is built for the CPU, and this machine has {_counted(kernel.nvidia, 'NVIDIA GPU')}"
        )
        yield HostFinding("torch", "bad", text, f"{INSTALL}cu128 (or the cuXXX that the driver serves, see nvidia-smi)")
    elif kernel.amd and environ.get("HIP_VISIBLE_DEVICES") != "":
        text = f"torch {answer.version} is built for the CPU, and this machine has {_counted(kernel.amd, 'AMD GPU')}"
        yield HostFinding("torch", "bad", text, f"{INSTALL}rocm6.4 (or the rocmX.Y that is installed here)")
    else:
        yield HostFinding("torch", "good", f"{answer.version}, for the CPU; imported in {answer.seconds:.1f} s")


def _judge_cuda(answer: TorchAnswer, kernel: KernelDevices, environ: Mapping[str, str]) -> HostFinding:
    nccl = f", NCCL {answer.nccl}" if answer.nccl else ""
    build = f"{answer.version} for CUDA {answer.cuda}{nccl}"
    if answer.available and (unfit := _without_code(answer)):
        text = f"{build} has no code for {', '.join(unfit)}, which devices here are; it has {', '.join(answer.arches)}"
        remedy = "Install a build of torch that has it: a newer one for newer GPUs, an older one for older GPUs"
        return HostFinding("torch", "bad", text, remedy)
    if answer.available:
        return HostFinding("torch", "good", f"{build}; it uses {_counted(answer.devices, 'device')}")
    if environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return HostFinding("torch", "good", f"{build}; CUDA_VISIBLE_DEVICES shows it no device")
    # Releases of one major version serve each other, an older major version does not.
    if answer.driver and answer.driver // 1000 < int(str(answer.cuda).partition(".")[0]):
        served = f"{answer.driver // 1000}.{answer.driver % 1000 // 10}"
        text = f"{build}, and the driver is too old for that: it serves CUDA {served}"
        return HostFinding(
            "torch",
            "bad",
            text,
            f"Update NVIDIA's driver, or {INSTALL}cu{served.replace('.', '')} (or the next lower that there is)",
        )
    if kernel.nvidia:
        why = f": {one_line(answer.why)}" if answer.why else ""
        text = f"{build} cannot use the {_counted(kernel.nvidia, 'GPU')} that the driver shows{why}"
        remedy = (
            "Ask for them (srun --gpus-per-node); look at nvidia-smi, CUDA_VISIBLE_DEVICES, who may open /dev/nvidia*"
        )
        return HostFinding("torch", "bad", text, remedy)
    if kernel.nvidia_on_bus:
        text = f"{build}, and {_counted(kernel.nvidia_on_bus, 'NVIDIA GPU')} on the bus without a driver here"
        remedy = "Install NVIDIA's driver; in a container start it with --gpus all (Docker) or --nv (Apptainer)"
        return HostFinding("torch", "bad", text, remedy)
    return HostFinding("torch", "good", f"{build}; this machine has no GPU, so ranks use the CPU")


def _without_code(answer: TorchAnswer) -> list[str]:
    """The compute capabilities of devices that this build cannot run on.

    Binary code runs on its own major version from its minor version on, and PTX ("compute") on all from its own on.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", each) for each in answer.arches]
    codes = [(each[1], [int(each[2]), int(each[3])]) for each in found if each]
    unfit = {
        f"sm_{''.join(map(str, device))}"
        for device in answer.capabilities
        if len(device) == 2
        and codes
        and not any(code <= device and (kind == "compute" or code[0] == device[0]) for kind, code in codes)
    }
    return sorted(unfit)


def _judge_rocm(answer: TorchAnswer, kernel: KernelDevices) -> HostFinding:
    build = f"{answer.version} for ROCm {answer.hip}"
    if answer.available:
        return HostFinding("torch", "good", f"{build}; it uses {_counted(answer.devices, 'device')}")
    if kernel.amd:
        why = f": {one_line(answer.why)}" if answer.why else ""
        text = f"{build} cannot use the {_counted(kernel.amd, 'GPU')} that the driver shows{why}"
        remedy = "Look at rocm-smi, and whether this user may open /dev/kfd (groups render and video)"
        return HostFinding("torch", "bad", text, remedy)
    return HostFinding("torch", "good", f"{build}; this machine has no GPU, so ranks use the CPU")


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
