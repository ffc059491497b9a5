"""Names that torch does not promise to keep, for `parallel`: each with a feature test and a way to go on without it.

Contract: no other module of this package uses a private name of torch. `can_queue_callbacks`,
`can_time_ddp` and `can_rebuild_buckets` are asked before the names are used. Where this torch lacks one, they warn once
and return False, and DDP is used without what is named below.
All names were there before torch 2.9, the oldest that allstep supports.

| name | what for | without it |
| --- | --- | --- |
| autograd.Variable._execution_engine | a call when a backward pass has all gradients | not timed, not counted |
| DistributedDataParallel._pre_forward | the time in which DDP synchronises buffers | not timed |
| torch._compile._disable_dynamo | leaving the timing out of what is compiled | not timed |
| Reducer._rebuild_buckets | DDP's final bucket layout before the first iteration | DDP's own layouts |
| DistributedDataParallel._has_rebuilt_buckets | telling DDP that the layout is final | DDP's own layouts |
| torch._dynamo.eval_frame.OptimizedModule | knowing what torch.compile returned | only the attribute below |
| DTensor.__create_chunk_list__ | where a rank's shard lies | computed, for Shard and Replicate |
| OptimizedModule._orig_mod | the module that was compiled | the compiled module is taken for the user's own |
| torch._dynamo.utils.get_compilation_metrics | counting what was compiled, and why again | not counted |
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.errors import UnsupportedStateError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Function = TypeVar("Function", bound=Callable[..., Any])

_warned: set[str] = set()


def can_time_ddp() -> bool:
    """Whether this torch lets the waits of DDP be measured."""
    has_all = can_queue_callbacks()
    if not hasattr(DistributedDataParallel, "_pre_forward"):
        has_all = _without("DistributedDataParallel._pre_forward", _NOT_TIMED)
    if _disable_dynamo() is None:
        has_all = _without("torch._compile._disable_dynamo", _NOT_TIMED)
    return has_all


def can_queue_callbacks() -> bool:
    """Whether this torch tells when a backward pass has all gradients."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    return hasattr(engine, "queue_callback") or _without("torch.autograd.Variable._execution_engine", _NOT_TIMED)


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Have the autograd engine call this when the running backward pass has all gradients; called in a backward pass.

    Callbacks are called in the order in which they were queued.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def not_compiled(function: Function) -> Function:
    """The function, left out of what torch.compile compiles.

    `torch.compiler.disable` does the same, and would import the compiler here and now, which takes a second. This
    way of torch's own imports it when the function is first called by compiled code.
    """
    disable = _disable_dynamo()
    return function if disable is None else disable(function)


def _disable_dynamo() -> Any:
    return getattr(sys.modules.get("torch._compile"), "_disable_dynamo", None)


class BracketedDDP(DistributedDataParallel):
    """DDP whose work before a forward pass happens inside `before_forward`."""

    def before_forward(self) -> AbstractContextManager[None]:
        """To be overridden."""
        return nullcontext()

    @not_compiled
    def _pre_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        with self.before_forward():
            return super()._pre_forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]


def can_rebuild_buckets(ddp: DistributedDataParallel) -> bool:
    """Whether this torch lets DDP's bucket layout be fixed before the first iteration."""
    has_all = True
    if not hasattr(ddp.reducer, "_rebuild_buckets"):
        has_all = _without("Reducer._rebuild_buckets", _NOT_FIXED)
    if not hasattr(ddp, "_has_rebuilt_buckets"):
        has_all = _without("DistributedDataParallel._has_rebuilt_buckets", _NOT_FIXED)
    return has_all


def rebuild_buckets(ddp: DistributedDataParallel) -> None:
    """Lay DDP's buckets out in the order of the gradients of the backward pass before.

    A second forward pass would do this, and leave DDP waiting for a backward pass.
    """
    ddp._has_rebuilt_buckets = ddp.reducer._rebuild_buckets()


def compiled_from(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile made this one from; None where it was not compiled."""
    # Importing torch._dynamo takes seconds, and where nothing has imported it nothing is compiled.
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return None
    kind = getattr(frames, "OptimizedModule", None)
    if kind is not None and not isinstance(module, kind):
        return None
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module):
        return original
    if kind is not None:
        _without("OptimizedModule._orig_mod", "a compiled module is taken for the user's own")
    return None


def compilations_since(moment: float) -> list[tuple[str, str | None]] | None:
    """What torch.compile has compiled since a moment of `time.time()`: each function, and why it was compiled again.

    Torch keeps the last 64. None where this torch does not tell.
    """
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:  # nothing was compiled yet
        return []
    metrics = getattr(utils, "get_compilation_metrics", None)
    needed = ("co_name", "co_filename", "co_firstlineno", "start_time", "recompile_reason")
    found = [] if metrics is None else metrics()
    if metrics is None or not all(hasattr(each, name) for each in found for name in needed):
        _without("torch._dynamo.utils.get_compilation_metrics", "what is compiled again is not counted")
        return None
    return [
        (f"{each.co_name} ({os.path.basename(each.co_filename or '')}:{each.co_firstlineno})", each.recompile_reason)
        for each in found
        if each.co_name is not None and (each.start_time or 0.0) >= moment  # a backward pass has no name
    ]


_NOT_TIMED = "backward passes are not watched, so the time in which a rank waits for gradients counts as its own"
_NOT_FIXED = "DDP lays its buckets out by itself, so a resumed run may differ in the last bits"


def _without(name: str, consequence: str) -> bool:
    """Warn once that this torch lacks a name; False, for what depends on it."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"this torch, {torch.__version__}, has no {name}: {consequence}; update allstep",
            RuntimeWarning,
            stacklevel=5,
        )
    return False


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
    _without("DTensor.__create_chunk_list__", "shards are located from the placements alone")
    return [_shard_box(tensor)]


def _shard_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor import Replicate, Shard

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
