"""The copy of the state that is written while training goes on.

Contract: `Stager.stage` returns when the values are copied; only that time is training blocked. The memory is kept for
the next save, which then neither allocates nor touches new pages, and the layout too where names and shapes are the
same. What it gave is overwritten by the next call, so there is one save at a time. Tensors on an accelerator go through
pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from allstep.checkpoint.dtypes import stored_as, stored_shape, to_stored
from allstep.checkpoint.shards import Layout, lay_out

_Key = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Staged:
    """A file's header and its data, ready to be written."""

    header: bytes
    data: memoryview

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data.nbytes


class Stager:
    """Copies tensors to where they wait to be written."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._keys: tuple[_Key, ...] | None = None
        self._layout = lay_out([], {})
        self._places: dict[str, torch.Tensor] = {}

    def stage(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> Staged:
        """Copy tensors, each with the key that the file has for it."""
        keys = tuple((key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors)
        if keys != self._keys:
            self._prepare(keys, pinned=any(tensor.is_cuda for _, tensor in tensors))
        devices = set()
        for key, tensor in tensors:
            self._places[key].copy_(to_stored(tensor), non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        data = self._buffer[: self._layout.data_size].numpy()
        return Staged(self._layout.header, data.data)

    def _prepare(self, keys: tuple[_Key, ...], *, pinned: bool) -> None:
        self._keys, self._places = None, {}
        self._layout = lay_out(
            ((key, stored_as(dtype), stored_shape(dtype, shape)) for key, dtype, shape in keys), {"format": "pt"}
        )
        size = self._layout.data_size
        if self._buffer.numel() < size or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # let go of the old memory first
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._places = _views(self._buffer, self._layout)
        self._keys = keys


def _views(buffer: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    return {slot.key: buffer[slot.begin : slot.end].view(slot.dtype).view(slot.shape) for slot in layout.slots}
