"""Which device and which backend a rank uses.

Contract: `visible_hardware` sees what this process can use. `choose_device`, `choose_backend`, `choose_transport` and
`bound_device` decide, as pure functions, from that, the `Placement` and what the caller asked for. One process cannot
see that two ranks were given the same GPU: the monitoring service does, when the ranks register.

torch_xla is imported only when an XLA device is asked for. That part is written to torch_xla's interface; allstep's
tests have no XLA device to run it on, and put a stand-in in its place.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from allstep.errors import WorldError
from allstep.placement import Placement

_ON_HOST = (None, "gloo", "mpi", "ucc", "fake")  # of gloo's collectives only some take tensors of a device


@dataclass(frozen=True, slots=True)
class VisibleHardware:
    """What this process can use: the number of visible CUDA devices, and whether there is Apple's MPS."""

    cuda: int = 0
    mps: bool = False


def visible_hardware() -> VisibleHardware:
    """See what this process can use, without initialising CUDA."""
    return VisibleHardware(cuda=torch.cuda.device_count(), mps=torch.backends.mps.is_available())


def choose_device(
    placement: Placement, hardware: VisibleHardware, asked: str | torch.device | None = None
) -> torch.device:
    """The device of one rank.

    Unasked: CUDA where there is any, by local rank; index 0 where one device is visible, which is how schedulers give
    each task its own. Else MPS for a world of one, else the CPU. XLA only when asked for, or when the placement came
    from XLA's own launcher.

    Args:
        placement: which rank this is.
        hardware: what the process can use.
        asked: a device type or a full device; a CUDA device with an index is taken as it is.

    Raises:
        WorldError: what was asked for is not there, or there are fewer devices than ranks.
    """
    if asked is None:
        if placement.launcher == "xla":
            return torch.device("xla")
        if hardware.cuda:
            return torch.device("cuda", _cuda_index(placement, hardware))
        # Collectives and DDP do not support MPS.
        if hardware.mps and placement.world_size == 1:
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise WorldError(f"device is {asked!r}, which torch does not know: {error}") from error
    if device.type == "cuda":
        if not hardware.cuda:
            raise WorldError(
                f"device is {asked!r}, but this process sees no CUDA device; check the driver, CUDA_VISIBLE_DEVICES "
                "and that torch was built with CUDA, or leave device unset"
            )
        index = _cuda_index(placement, hardware) if device.index is None else device.index
        if index >= hardware.cuda:
            raise WorldError(f"device is {asked!r}, but this process sees {hardware.cuda} CUDA devices, from 0")
        return torch.device("cuda", index)
    if device.type == "mps":
        if not hardware.mps:
            raise WorldError(f"device is {asked!r}, but MPS is not available in this process; leave device unset")
        if placement.world_size > 1:
            raise WorldError(
                f"device is {asked!r} in a world of {placement.world_size}, but collectives and DDP do not support "
                'MPS; run one process, or pass device="cpu"'
            )
    return device


def _cuda_index(placement: Placement, hardware: VisibleHardware) -> int:
    # One visible device: the scheduler shows each task its own, and every task calls it 0.
    if hardware.cuda == 1:
        return 0
    if placement.local_rank >= hardware.cuda:
        raise WorldError(
            f"local rank {placement.local_rank} of {placement.local_world_size} sees {hardware.cuda} CUDA "
            f"devices; start at most {hardware.cuda} processes on a node, have the scheduler show each task its own "
            "device, or pass device="
        )
    return placement.local_rank


def choose_backend(device: torch.device, asked: str | None = None) -> str:
    """The process group's backend for a device: nccl for CUDA, gloo for the CPU, or the one asked for.

    Raises:
        WorldError: the backend asked for cannot serve the device, or torch has no such backend.
    """
    if asked is None:
        return "xla" if device.type == "xla" else dist.get_default_backend_for_device(device.type)
    asked = asked.lower()
    if asked == "nccl" and device.type != "cuda":
        raise WorldError(
            f"backend is 'nccl', which needs a CUDA device, but the device is {device}; leave backend unset "
            "or pass 'gloo'"
        )
    if ":" not in asked and not dist.is_backend_available(asked):
        known = ", ".join(name for name in dist.Backend.backend_list if dist.is_backend_available(name))
        raise WorldError(f"backend is {asked!r}, which this torch does not have; it has {known}")
    return asked


def backend_of(device_type: str, backend: str) -> str | None:
    """Which backend carries tensors of a type of device in a group; None where the group has none for it.

    Args:
        device_type: such as "cuda".
        backend: of the group: one name, or one for each type of device, as in "cpu:gloo,cuda:nccl".
    """
    if ":" in backend:
        return dict(part.split(":", 1) for part in backend.split(",")).get(device_type)
    # What torch knows to carry tensors of some device alone, such as nccl, carries no others.
    capable = dist.Backend.backend_capability.get(backend)
    return backend if capable is None or device_type in capable else None


def choose_transport(device: torch.device, backend: str) -> torch.device:
    """Where a tensor must be for the backend to carry it: the rank's device, or the CPU for gloo and the like."""
    return torch.device("cpu") if backend_of(device.type, backend) in _ON_HOST else device


def bound_device(device: torch.device, backend: str) -> torch.device | None:
    """The device that a group is bound to: bound, nccl connects at once, where a failure can be told, and not later."""
    return device if backend_of(device.type, backend) == "nccl" else None


def open_xla_device() -> torch.device:
    """This process' XLA device; also registers torch_xla's backend for process groups.

    Raises:
        WorldError: torch_xla is not installed or does not load beside this torch.
    """
    try:
        torch_xla = importlib.import_module("torch_xla")
        importlib.import_module("torch_xla.distributed.xla_backend")
    except ImportError as error:
        raise WorldError(
            f"an XLA device was asked for, but torch_xla does not load: {error}; "
            "install a torch_xla of the same version as torch with `pip install 'allstep[xla]'`, or pass device='cpu'"
        ) from error
    return torch.device(torch_xla.device())


def seed_device(seed: int) -> None:
    """Seed the XLA device's own generator, which `torch.manual_seed` does not reach."""
    importlib.import_module("torch_xla.core.xla_model").set_rng_state(seed)
