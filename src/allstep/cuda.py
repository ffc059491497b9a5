"""All calls that CUDA alone has, which ROCm's devices answer too. What any accelerator has goes by `torch.accelerator`.

Contract: packages that use devices call these with a CUDA device, and check the type before. None of them is called
where there is no such device, but for `device_count`, which starts none. `tests/test_house.py` sees that `torch.cuda`
stands nowhere else.

Most of this is memory of the host that copies run into without the host waiting. `HostMemory` is plain memory that is
registered with the driver (`cudaHostRegister`). torch's own pinned memory comes from an allocator that rounds up to the
next power of two and never gives back, which for the copy of a large model is most of a machine's memory. Registered
memory has the size that was asked for, and goes back when it is dropped. Copies that are small and soon read, such as a
batch's outputs, go through torch's allocator (`copied_ahead`). `has_pinned_memory` asks of devices of any type.

What can go wrong: the driver refuses, or so much is asked for that the machine would have too little left. Then the
memory is as it was, copies make the host wait, and one line says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from typing import Any

import torch

log = logging.getLogger("allstep.world")

# What asks about devices


def device_count() -> int:
    """How many CUDA devices this process sees; CUDA is not started."""
    return torch.cuda.device_count()


def use_device(device: torch.device) -> None:
    """Have CUDA use the device where none is named."""
    torch.cuda.set_device(device)


def device_name(device: torch.device) -> str:
    """What the driver calls the device, such as "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name(device)


def device_uuid(device: torch.device) -> str:
    """What tells the device from all others, by whatever index processes see it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """NVIDIA's number for what the device can compute, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


# Memory of the host

_said: set[str] = set()


def has_pinned_memory(device_type: str) -> bool:
    """Whether torch pins memory for copies to a type of device, as it does for CUDA and XPU; of others it is asked."""
    if device_type in ("cuda", "xpu"):
        return True
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or kind.type != device_type or device_type == "mps":  # whose memory is the host's
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except (RuntimeError, NotImplementedError):
        return False


class HostMemory:
    """Bytes on the host.

    Args:
        size: how many.
        pinned: have copies from a CUDA device run into them without waiting, where that can be.
        most: bytes above which they are not pinned.

    Attributes:
        bytes: uint8 (size,). It must not be used any more once this object is gone.
        pinned: whether it is.
    """

    def __init__(self, size: int, *, pinned: bool = False, most: int | None = None) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.pinned = pinned and size > 0 and _register(self.bytes, pinnable() if most is None else most)
        if self.pinned:
            # The callback holds the tensor, so its memory is freed after it is unregistered.
            weakref.finalize(self, _unregister, self.bytes).atexit = False


def copied_ahead(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host of a tensor on a CUDA device; its values are there when an event behind it has come to pass.

    It is in memory that torch pins, and the host waits after all where torch cannot pin any.
    """
    try:
        return tensor.to("cpu", non_blocking=True)
    except RuntimeError as error:
        copy = tensor.to("cpu")  # which raises too where the device has failed
        _say(f"{tensor.nbytes:,} bytes on the host cannot be pinned: {_first_line(error)}")
        return copy


def recorded_event(device: torch.device) -> torch.Event:
    """An event behind what is queued on a device now."""
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


def wait_for_copies(device: torch.device) -> None:
    """Have the host wait for what was queued on a CUDA device until now, by the stream that is current there."""
    torch.cuda.current_stream(device).synchronize()


def pinnable() -> int:
    """Bytes that a process of this machine may pin: half of the memory, shared by the ranks that are here."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or "1")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // max(1, ranks)


def _register(memory: torch.Tensor, most: int) -> bool:
    if memory.nbytes > most:
        _say(f"{memory.nbytes:,} bytes on the host are not pinned, since more than {most:,} would be")
        return False
    try:
        status = int(_runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    except RuntimeError as error:
        _say(f"{memory.nbytes:,} bytes on the host cannot be pinned: {_first_line(error)}")
        return False
    if status:
        _say(f"{memory.nbytes:,} bytes on the host cannot be pinned: CUDA says {status}")
        _clear_error()
    return status == 0


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _clear_error() -> None:
    """Take away what CUDA keeps of a refusal: whoever launches a kernel next would be told of it."""
    with contextlib.suppress(RuntimeError):  # which torch raises of it, and then it is gone
        torch.ones(1, device="cuda")


def _unregister(memory: torch.Tensor) -> None:
    with contextlib.suppress(RuntimeError):  # the device may be gone by now
        _runtime().cudaHostUnregister(memory.data_ptr())


def _first_line(error: RuntimeError) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)  # CUDA's own go on with advice


def _say(text: str) -> None:
    """Log once in a process for each kind of reason."""
    reason = text.rpartition(" ")[2]
    if reason not in _said:
        _said.add(reason)
        log.warning("%s; copies from the device make the host wait", text)
