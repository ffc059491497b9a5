"""Which devices `allstep run --device TYPE` starts workers for, and what workers of that type need to know.

Contract: `devices_of` counts the devices of a type, as `visible_devices` does for CUDA, which it asks where no type is
given. Where that finds none it looks for AMD's GPUs, which torch calls CUDA too. It imports no torch, so it knows the
types whose devices a kernel shows: CUDA, ROCm and TPU. Of other types `auto` is what it is without devices, and
`--nproc` says how many. `tpu_environment` has torch_tpu say, in a process of its own, what all of its ranks have to
agree on before they begin. torch_xla needs nothing beforehand: each rank takes its own device in `allstep.init`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from allstep.errors import ConfigurationError
from allstep.launch.devices import CudaHardware, Devices, visible_devices
from allstep.protocol.foreign_text import one_line

VARIABLE = "ALLSTEP_DEVICE"
"""Tells workers their type of device, which a script's own `device=` comes before."""

_PCI = Path("/sys/bus/pci/devices")
_KFD = Path("/sys/class/kfd/kfd/topology/nodes")
_SIMD = re.compile(r"^simd_count (\d+)$", re.MULTILINE)
_GOOGLE = "0x1ae0"
# By generation, as Google's drivers know them: v2 and v3, v4, v5e, v5p, v6e, 7x.
_CHIPS = ("0x0027", "0x005e", "0x0063", "0x0062", "0x006f", "0x0076")
_SET_UP_S = 330.0  # torch_tpu asks the devices for their place, for up to 300 s
_SET_UP = """
import json, os, sys
import torch
from torch.tpu import distributed
distributed.set_tpu_launch_env(nproc_per_node=int(sys.argv[1]), nnodes=int(sys.argv[2]))
print(json.dumps({name: value for name, value in os.environ.items() if name.startswith("TORCH_TPU_")}))
"""


def devices_of(
    kind: str | None,
    environ: Mapping[str, str],
    probe: Callable[[], CudaHardware],
    chips: Callable[[], int],
    rocm: Callable[[], int],
) -> Devices:
    """The devices of a type that workers started with `environ` could use.

    Args:
        kind: such as "cuda", "xla" or "cpu"; None where the workers choose by themselves.
        environ: what workers inherit.
        probe: counts CUDA devices; called where it matters.
        chips: counts TPU chips; likewise.
        rocm: counts AMD's GPUs; likewise.
    """
    runtime = environ.get("PJRT_DEVICE", "TPU" if kind == "xla" else "")
    if kind == "tpu" or (kind in (None, "xla") and runtime == "TPU"):
        # Under SPMD one process has all devices of its host.
        is_one = kind != "tpu" and environ.get("XLA_USE_SPMD", "0") in ("1", "true", "True")
        return Devices() if is_one else Devices(tuple(map(str, range(chips()))))
    if kind not in (None, "cuda"):
        return Devices()
    found = visible_devices(environ, probe)
    if found.names or found.doubt:
        return found
    count = rocm()
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if name in environ:  # each of them narrows what the one before has left
            count = min(count, len([entry for entry in environ[name].split(",") if entry.strip() not in ("", "-1")]))
    return Devices(tuple(map(str, range(count))))


def rocm_gpus(nodes: Path = _KFD) -> int:
    """How many GPUs AMD's driver shows on this machine: nodes of its topology with SIMD units, which CPUs lack."""
    return sum(any(int(units) for units in _SIMD.findall(_read(node / "properties"))) for node in nodes.glob("*"))


def tpu_chips(pci: Path = _PCI) -> int:
    """How many TPU chips the kernel shows on this machine; 0 where it shows none, or nothing at all."""
    return sum(_read(device / "vendor") == _GOOGLE and _read(device / "device") in _CHIPS for device in pci.glob("*"))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def tpu_environment(workers: int, nodes: int, environ: Mapping[str, str]) -> dict[str, str]:
    """What torch_tpu's own launching function sets for the workers of this machine.

    Args:
        workers: on this machine.
        nodes: machines.
        environ: what workers inherit.

    Raises:
        ConfigurationError: torch_tpu is not installed, or says why there can be no such run.
    """
    command = [sys.executable, "-c", _SET_UP, str(workers), str(nodes)]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=_SET_UP_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"device is 'tpu', and torch_tpu did not set up its ranks in {_SET_UP_S:g} s"
        ) from None
    if done.returncode:
        said = next(filter(None, map(str.strip, reversed(done.stderr.splitlines()))), "nothing")
        raise ConfigurationError(
            f"device is 'tpu', and torch_tpu cannot set up its ranks: {one_line(said)}. Install torch_tpu beside the "
            "torch that it is made for, on a machine with TPU chips"
        )
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found
