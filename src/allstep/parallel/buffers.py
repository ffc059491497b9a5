"""Buffers of one model on all ranks, such as the running statistics of BatchNorm.

Contract: in training each rank's forward pass writes its own batch's statistics. DDP gives all ranks those of rank 0 at
the beginning of the next forward pass. Until then ranks hold different models, of which rank 0's is the one that a save
holds. `unify_buffers` gives them rank 0's now. Every rank calls it at the same point; it changes no training, since the
next forward pass would do the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def broadcasts_buffers(module: nn.Module) -> bool:
    """Whether this is a DDP module that gives buffers rank 0's values in its forward passes, and that has any."""
    return (
        isinstance(module, DistributedDataParallel)
        and module.broadcast_buffers
        and any(True for _ in module.module.buffers())
    )


def unify_buffers(module: nn.Module) -> None:
    """Give the buffers of a module the values that rank 0 has; a collective of its DDP group, else of all ranks.

    Args:
        module: a DDP module, or any other. Buffers that DDP is told to ignore stay, and so do sharded ones.
    """
    ddp = module if isinstance(module, DistributedDataParallel) else None
    inner = module if ddp is None else ddp.module
    ignored = set() if ddp is None else ddp.parameters_to_ignore
    buffers = [each for name, each in inner.named_buffers() if name not in ignored]
    broadcast_from_first(buffers, None if ddp is None else ddp.process_group)


def broadcast_from_first(tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give tensors the values of the group's first rank, all of one device in one message."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for each in tensors:
        if each.layout is torch.strided and not hasattr(each, "device_mesh") and each.numel():
            by_device.setdefault(each.device, []).append(each.detach())
    source = 0 if group is None else dist.get_global_rank(group, 0)
    for same_device in by_device.values():
        # As bytes, so that integers, booleans and floats go together.
        sent = [each.contiguous().reshape(-1).view(torch.uint8) for each in same_device]
        message = torch.cat(sent)
        dist.broadcast(message, source, group=group)
        parts = torch.split(message, [each.numel() for each in sent])
        for each, part in zip(same_device, parts, strict=True):
            # Cloned, since a part may begin at an address that its type cannot be read from.
            each.copy_(part.clone().view(each.dtype).view(each.shape))
