"""DTensors, torch's tensors in parts over ranks, told from others without importing them.

Contract: `is_dtensor` is asked everywhere instead of `isinstance`. Importing `torch.distributed.tensor` takes half as
long as importing torch. Nothing can be a DTensor before something has imported it, and ranks that divide no model and
make no optimizer never need to. So modules of allstep name it in annotations only, or import it in the function that
makes one.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether this is a DTensor."""
    # None also where another thread is about to import it.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's whole value as a plain tensor, through which gradients flow; any other tensor as it is.

    For what a divided model gives as a DTensor, such as a loss in `World.loss_parallel`, which metrics and collectives
    do not take. Collective over the tensor's mesh.
    """
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def loss_parallel() -> AbstractContextManager[None]:
    """torch's context of that name, for a cross entropy of logits that stay divided."""
    from torch.distributed.tensor import parallel

    return parallel.loss_parallel()
