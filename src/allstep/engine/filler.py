"""A step run by a rank that has no batch of its own, so that it leaves no trace.

Contract: in an iteration that is not this rank's own (`state.active` is False) the engine runs the step on a filler
batch, because the other ranks' collectives, in backward, in forward and in the step itself, wait for this rank's.
Inside `without_trace` the gradients that reach the parameters of wrapped modules are zero, whatever the filler's loss
was, non-finite included, and their buffers are afterwards as they were before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


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
    """Run a step so that neither gradients nor buffers of `modules` are changed by it, while its collectives match."""
    modules = list(modules)
    buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    try:
        with without_gradient(modules):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def without_reduction(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run a step whose gradients are added up on this rank and not yet reduced over ranks (DDP's `no_sync`)."""
    with ExitStack() as stack:
        for module in modules:
            no_sync = getattr(module, "no_sync", None)
            if no_sync is not None:
                stack.enter_context(no_sync())
        yield
