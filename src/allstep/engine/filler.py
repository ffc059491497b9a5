"""What is kept of a batch that the step may change: for a rank that has none later, or to give it again.

Contract: both are made before the step is given the batch, which the step owns and may change: take keys out, write
into tensors, free their memory. `KeptBatch` keeps what a rank without a batch takes part with. Each `copy` is as the
batch was then, with containers and tensors of its own. A batch on a device is kept on the host, so that no device
memory is held between fillers, and copied back for each. `apart` keeps the same tensors in containers of its own, which
costs little: it is for each batch of an iterator, until its step is done. Nothing can go wrong with tensors, arrays and
the containers that `World.to_device` knows. Of other objects a shallow copy is kept; of one that refuses, itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from allstep.world.move import rebuilt


class HostTensor:
    """A tensor's values on the host, and the device where they belong. A leaf, and so no dataclass."""

    __slots__ = ("device", "values")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.values = tensor.detach().cpu()
        self.device = tensor.device


class KeptBatch:
    """A batch as it is now."""

    def __init__(self, batch: Any) -> None:
        self._kept = _rebuilt_or_itself(batch, _kept)

    def copy(self) -> Any:
        """The batch as it was when it was kept, to be changed at will."""
        return _rebuilt_or_itself(self._kept, _given)


def apart(batch: Any) -> Any:
    """A batch in containers of its own, with the same tensors."""
    return _rebuilt_or_itself(batch, lambda leaf: leaf)


def _rebuilt_or_itself(batch: Any, leaf: Callable[[Any], Any]) -> Any:
    try:
        return rebuilt(batch, leaf)
    except Exception:  # a container that cannot be built anew: better a batch that the step changed than none
        return batch


def _kept(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
    return _cloned(leaf) if leaf.device.type == "cpu" else HostTensor(leaf)


def _given(leaf: Any) -> Any:
    if isinstance(leaf, HostTensor):
        return leaf.values.to(leaf.device)
    if isinstance(leaf, torch.Tensor):
        return _cloned(leaf)
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
