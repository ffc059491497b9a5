"""DDP that says when it waits for the other ranks, so that a step's own time can be told from its waiting.

Contract: `wrap_module` makes one in place of plain DDP where a service is told and the host waits. That is on the CPU,
where gloo's reductions end inside `backward`. What is measured there is the time from the moment that this rank has all
of its own gradients until all reductions have ended ("gradients"), and the time in which DDP synchronises buffers and
buckets before a forward pass ("buffers"). Reductions that ran beside the backward pass cost no waiting. On CUDA the
host only queues kernels and waits at whatever reads a result, so plain DDP is used and nothing is measured.

How: a hook on the outputs queues a callback of the autograd engine when the backward pass begins. The engine calls such
callbacks in order when all gradients are there. DDP queues the one that waits for its reductions later, when its last
bucket is ready. So ours is called first, and one that it queues in turn is called after DDP's. Under torch.compile both
are left out of what is compiled, and the module inside is compiled whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from allstep.parallel.torch_private import BracketedDDP, not_compiled, queue_backward_callback
from allstep.protocol.heartbeat import RankActivity


class TimedDDP(BracketedDDP):
    """DDP that tells `activity` when it waits. A copy, pickled or not, has none and measures nothing."""

    activity: RankActivity | None = None

    def before_forward(self) -> AbstractContextManager[None]:
        """The wait in which DDP synchronises buffers and buckets."""
        return nullcontext() if self.activity is None else self.activity.wait("buffers")

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As in DDP."""
        output = super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        if self.activity is not None and torch.is_grad_enabled() and self.require_backward_grad_sync:
            _time_backward(output, self.activity)
        return output

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("activity", None)
        return state


@not_compiled
def _time_backward(output: Any, activity: RankActivity) -> None:
    """Tell `activity` of the backward passes through `output`."""
    hook = _backward_hook(activity)
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _backward_hook(activity: RankActivity) -> Callable[[torch.Tensor], None]:
    """The hook for all outputs of one forward pass; it acts once in a backward pass."""
    has_begun = False

    def backward_began(gradient: torch.Tensor) -> None:
        nonlocal has_begun
        if not has_begun:
            has_begun = True
            queue_backward_callback(gradients_are_there)

    def gradients_are_there() -> None:
        nonlocal has_begun
        has_begun = False  # the graph may be kept for another backward pass
        if not activity.waiting:  # else another forward pass of this backward has said so
            activity.wait_began("gradients")
            queue_backward_callback(activity.wait_ended)

    return backward_began


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(list(vars(value).values()))
