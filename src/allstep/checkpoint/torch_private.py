"""Names that torch does not promise to keep, for `checkpoint`: each behind one function that goes on without it.

Contract: no other module of this package uses a private name of torch. Each function looks for its name when it is
called, so that a torch without it costs one warning and some speed, and never an AttributeError.

| name | what for | since torch | without it |
| --- | --- | --- | --- |
| DTensor.__create_chunk_list__ | where a rank's shard lies | before 2.9 | computed, for Shard and Replicate |
| Tensor.__tensor_flatten__ | knowing a tensor that is made of others | before 2.9 | saving one fails in the copy |
| _metadata of a state dict | the versions of submodules | before 2.9 | saved without versions |

2.9 is the oldest torch that allstep supports.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from allstep.errors import UnsupportedStateError

log = logging.getLogger("allstep.checkpoint")


def shard_boxes(tensor: DTensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes of a DTensor that this rank holds.

    Uses `DTensor.__create_chunk_list__`, the protocol of torch's own distributed checkpoints, which knows every
    placement; torch has had it since before 2.9. Without it the box is computed here, for `Shard` and `Replicate`.

    Raises:
        UnsupportedStateError: torch has no such protocol any more, and the tensor has another placement.
    """
    create = getattr(tensor, "__create_chunk_list__", None)
    if callable(create):
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in create()]
    _warn_once("DTensor.__create_chunk_list__", "shards are located from the placements alone")
    return [_shard_box(tensor)]


def wraps_tensors(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that is made of other tensors, as quantised weights of torchao are.

    Asks for `__tensor_flatten__`, the protocol of torch.compile for such classes since before torch 2.9. Without it
    none is recognised; a tensor that has no memory of its own then fails when it is copied, which fails the save.
    """
    return hasattr(type(tensor), "__tensor_flatten__")


def module_versions(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The version of each submodule, which `Module.state_dict` hangs on its result for `load_state_dict` to upgrade by.

    Uses the attribute `_metadata` of a state dict, which torch has set since before 2.9. Without it there are no
    versions, and `load_state_dict` takes the state for one of the earliest version, as with any dict of tensors.
    """
    versions = getattr(state, "_metadata", None)
    return versions if isinstance(versions, dict) else None


def set_module_versions(state: Any, versions: dict[str, Any]) -> None:
    """Hang the versions of submodules on an `OrderedDict` that `load_state_dict` is to be given."""
    state._metadata = versions


def _shard_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    place: Sequence[int] | None = tensor.device_mesh.get_coordinate()
    if place is None:  # a rank outside the mesh holds nothing
        return tuple(offsets), (0,) * tensor.dim()
    # A tensor is cut by one dimension of the mesh after the other, each time as torch.chunk cuts.
    for mesh_dim, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            dim = placement.dim
            count = tensor.device_mesh.size(mesh_dim)
            longest = -(-sizes[dim] // count)
            begin = min(place[mesh_dim] * longest, sizes[dim])
            offsets[dim] += begin
            sizes[dim] = min(longest, sizes[dim] - begin)
        elif type(placement) is not Replicate:
            raise UnsupportedStateError(
                f"a DTensor is placed as {placement}, which this version of torch ({torch.__version__}) does not "
                "locate for checkpoints; redistribute it to Shard or Replicate before it is saved"
            )
    return tuple(offsets), tuple(sizes)


@cache
def _warn_once(name: str, instead: str) -> None:
    log.warning("torch %s has no %s any more: %s", torch.__version__, name, instead)
