"""Which device and which backend a rank uses.

Contract: `visible_hardware` sees what this process can use. `choose_device`, `choose_backend`, `choose_transport` and
`bound_device` decide, as pure functions, from that, the `Placement` and what the caller asked for. One process cannot
see that two ranks were given the same GPU: the monitoring service does, when the ranks register.

What is asked of torch_xla is in `xla_private`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from allstep.errors import WorldError
from allstep.placement import Placement
from allstep.world import xla_private

_OWN_DEVICES = ("", "CPU", "CUDA", "GPU")
"""Runtimes of torch_xla whose devices torch has by itself; torch_xla chooses one where there is no other."""

_ON_HOST = (None, "gloo", "mpi", "ucc", "fake")  # of gloo's collectives only some take tensors of a device


@dataclass(frozen=True, slots=True)
class VisibleHardware:
    """What this process can use.

    Attributes:
        cuda: the number of visible CUDA devices.
        mps: whether there is Apple's MPS.
        pjrt: which runtime torch_xla was told to use (PJRT_DEVICE), such as "TPU"; empty where it was not told.
    """

    cuda: int = 0
    mps: bool = False
    pjrt: str = ""


def visible_hardware() -> VisibleHardware:
    """See what this process can use, without initialising CUDA."""
    return VisibleHardware(
        cuda=torch.cuda.device_count(), mps=torch.backends.mps.is_available(), pjrt=os.environ.get("PJRT_DEVICE", "")
    )


def choose_device(
    placement: Placement, hardware: VisibleHardware, asked: str | torch.device | None = None
) -> torch.device:
    """The device of one rank.

    Unasked: CUDA where there is any, by local rank; index 0 where one device is visible, which is how schedulers give
    each task its own. Else MPS for a world of one, else the CPU. XLA before these where PJRT_DEVICE names an
    accelerator, such as TPU, or the placement came from XLA's own launcher.

    Args:
        placement: which rank this is.
        hardware: what the process can use.
        asked: a device type or a full device; a CUDA device with an index is taken as it is.

    Raises:
        WorldError: what was asked for is not there, or there are fewer devices than ranks.
    """
    if asked is None:
        if placement.launcher == "xla" or hardware.pjrt not in _OWN_DEVICES:
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


def step_end(device: torch.device) -> Callable[[], None] | None:
    """What tells a device that a step ends, where it collects work until then; None elsewhere."""
    return xla_private.end_step if device.type == "xla" else None


def seed_device(device: torch.device, seed: int) -> None:
    """Seed a device's own generator where `torch.manual_seed` does not reach it."""
    if device.type == "xla":
        xla_private.seed_generator(seed)
