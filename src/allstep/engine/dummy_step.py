"""A step run by a rank that has no batch of its own, so that it leaves no trace.

Contract: in an iteration that is not this rank's own (`state.active` is False) the engine runs the step on a filler
batch, because the other ranks' collectives, in backward, in forward and in the step itself, wait for this rank's.
Inside `without_trace` the gradients that reach the parameters of wrapped modules are zero, whatever the filler's loss
was, non-finite included, and their buffers are afterwards as they were before, or as DDP made them rank 0's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def without_gradient(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run a step so that the gradients it gives parameters of `modules` are zero, even those of a loss that is NaN."""
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    hooks = [p.register_hook(torch.zeros_like) for p in parameters.values()]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_trace(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run a step so that neither gradients nor buffers of `modules` are changed by it, while its collectives match.

    What DDP broadcasts of rank 0's buffers at the beginning of a forward pass is no trace of the step, and stays.
    """
    modules = list(modules)
    before = {id(buffer): (buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()}
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(_after_broadcast(module.module, before))
        try:
            with without_gradient(modules):
                yield
        finally:
            with torch.no_grad():
                for buffer, value in before.values():
                    buffer.copy_(value)


@contextmanager
def _after_broadcast(inner: nn.Module, before: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Note the buffers anew when `inner` is first called, which DDP does when it has broadcast them."""

    def note(*_: Any) -> None:
        hook.remove()
        before.update((id(buffer), (buffer, buffer.detach().clone())) for buffer in inner.buffers())

    hook = inner.register_forward_pre_hook(note, prepend=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def without_reduction(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run a step whose gradients are added up on this rank and not yet reduced over ranks (DDP's `no_sync`)."""
    with ExitStack() as stack:
        for module in modules:
            no_sync = getattr(module, "no_sync", None)
            if no_sync is not None:
                stack.enter_context(no_sync())
        yield
