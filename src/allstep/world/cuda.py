"""Calls that CUDA alone has: memory of the host that its copies run into without the host waiting.

`HostMemory` is plain memory that is registered with the driver (`cudaHostRegister`). torch's own pinned memory comes
from an allocator that rounds up to the next power of two and never gives back, which for the copy of a large model is
most of a machine's memory. Registered memory has the size that was asked for, and goes back when it is dropped.

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

_said: set[str] = set()


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
        _say(f"{memory.nbytes:,} bytes on the host cannot be pinned: {error}")
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


def _say(text: str) -> None:
    """Log once in a process for each kind of reason."""
    reason = text.rpartition(" ")[2]
    if reason not in _said:
        _said.add(reason)
        log.warning("%s; copies from the device make the host wait", text)
