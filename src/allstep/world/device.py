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

from allstep.cuda import device_count
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
        cuda: the number of visible CUDA devices, which ROCm's are too.
        mps: whether there is Apple's MPS.
        pjrt: which runtime torch_xla was told to use (PJRT_DEVICE), such as "TPU"; empty where it was not told.
        accelerator: torch's accelerator of any other kind, such as "xpu", or what a maker's backend calls itself.
        accelerators: how many of those this process sees.
    """

    cuda: int = 0
    mps: bool = False
    pjrt: str = ""
    accelerator: str = ""
    accelerators: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many devices of each type there are, beside the CPU."""
        found = {"cuda": self.cuda, "mps": int(self.mps), self.accelerator: self.accelerators}
        return {kind: count for kind, count in found.items() if count}

    @property
    def in_words(self) -> str:
        """What there is, for a message."""
        return ", ".join(["cpu", *(f"{kind} ({count})" for kind, count in self.counts.items())])


def visible_hardware() -> VisibleHardware:
    """See what this process can use, without initialising CUDA."""
    kind = torch.accelerator.current_accelerator()
    other = kind.type if kind is not None and kind.type not in ("cuda", "mps", "xla") else ""
    return VisibleHardware(
        cuda=device_count(),
        mps=torch.backends.mps.is_available(),
        pjrt=os.environ.get("PJRT_DEVICE", ""),
        accelerator=other,
        accelerators=torch.accelerator.device_count() if other else 0,
    )


def choose_device(
    placement: Placement, hardware: VisibleHardware, asked: str | torch.device | None = None
) -> torch.device:
    """The device of one rank.

    Unasked: CUDA where there is any, or torch's accelerator of another kind, by local rank; index 0 where one device is
    visible, which is how schedulers give each task its own. Else MPS for a world of one, else the CPU. XLA before these
    where PJRT_DEVICE names an accelerator, such as TPU, or the placement came from XLA's own launcher.

    Args:
        placement: which rank this is.
        hardware: what the process can use.
        asked: a device type or a full device; one with an index is taken as it is.

    Raises:
        WorldError: what was asked for is not there, or there are fewer devices than ranks.
    """
    if asked is None:
        if placement.launcher == "xla" or hardware.pjrt not in _OWN_DEVICES:
            return torch.device("xla")
        for kind, count in (("cuda", hardware.cuda), (hardware.accelerator, hardware.accelerators)):
            if count:
                return torch.device(kind, _index(placement, kind, count))
        # Collectives and DDP do not support MPS.
        return torch.device("mps" if hardware.mps and placement.world_size == 1 else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise WorldError(
            f"device is {asked!r}, which torch does not know; this process has {hardware.in_words}. A device of "
            "another maker is known once its package is imported, before init"
        ) from error
    if device.type in ("cpu", "xla"):
        return device
    name, count = device.type.upper(), hardware.counts.get(device.type, 0)
    if device.type == "cuda" and not count:
        raise WorldError(
            f"device is {asked!r}, but this process sees no CUDA device; check the driver, CUDA_VISIBLE_DEVICES "
            f"and that torch was built with CUDA, or leave device unset: there is {hardware.in_words}"
        )
    if not count:
        raise WorldError(
            f"device is {asked!r}, but {name} is not available in this process, which has {hardware.in_words}; leave "
            "device unset"
        )
    if device.type == "mps":
        if placement.world_size > 1:
            raise WorldError(
                f"device is {asked!r} in a world of {placement.world_size}, but collectives and DDP do not support "
                'MPS; run one process, or pass device="cpu"'
            )
        return device
    index = _index(placement, device.type, count) if device.index is None else device.index
    if index >= count:
        raise WorldError(f"device is {asked!r}, but this process sees {count} {name} devices, from 0")
    return torch.device(device.type, index)


def _index(placement: Placement, kind: str, count: int) -> int:
    # One visible device: the scheduler shows each task its own, and every task calls it 0.
    if count == 1:
        return 0
    if placement.local_rank >= count:
        raise WorldError(
            f"local rank {placement.local_rank} of {placement.local_world_size} sees {count} {kind.upper()} "
            f"devices; start at most {count} processes on a node, have the scheduler show each task its own "
            "device, or pass device="
        )
    return placement.local_rank


def unused_devices(device: torch.device, hardware: VisibleHardware) -> str:
    """One line on accelerators that are here and of a type that is not used; empty where there is none."""
    if device.type == "xla":  # whose runtime may be one over them
        return ""
    there = [f"{count} of {kind}" for kind, count in hardware.counts.items() if kind != device.type]
    if hardware.pjrt not in _OWN_DEVICES and device.type != "tpu":
        there.append(f"{hardware.pjrt}, which PJRT_DEVICE names")
    if not there:
        return ""
    named = "the CPU" if device.type == "cpu" else str(device)
    return f"the device is {named}, and this process also sees devices that it does not use: {' and '.join(there)}"


def choose_backend(device: torch.device, asked: str | None = None) -> str:
    """The process group's backend for a device: nccl for CUDA, gloo for the CPU, or the one asked for.

    Raises:
        WorldError: the backend asked for cannot serve the device, or torch has no such backend.
    """
    if asked is None:
        if device.type == "xla":
            return "xla"
        try:
            return dist.get_default_backend_for_device(device.type)
        except ValueError:  # a device whose maker registered no backend: what ranks give each other goes over the host
            return "gloo"
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
