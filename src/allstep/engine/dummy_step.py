"""The step as the loop calls it: counted where somebody weighs by samples, and without a trace where it runs a filler.

Contract: the loop calls what `prepared_step` makes of the user's step. Where ranks agree, that is an `agreed_step`. In
an iteration that is not this rank's own (`state.active` is False) the step runs on a filler batch, because the other
ranks' collectives, in backward, in forward and in the step itself, wait for this rank's. So does one whose batch has
no samples. Then the gradients that reach the parameters of wrapped modules are zero, whatever the filler's loss was,
non-finite included. Their buffers are afterwards as they were before, or as DDP made them rank 0's. Inside an
accumulation group gradients are added up and not reduced. All of it holds for modules in DDP and for modules in parts.

Where nobody votes, `counted_step` counts each batch before the step, which may change the batch, has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allstep.engine.autocast_step import step_in_precision
from allstep.engine.run import Run
from allstep.engine.step_boundary import bounded_step
from allstep.parallel import is_fully_sharded, unreduced, without_gradients


def prepared_step(run: Run, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The step as the loop calls it, with what the settings, agreement and whoever counts samples ask of it."""
    if run.settings.precision != "no":
        step = step_in_precision(step, run.settings.precision, run.modules)
    if run.handshake is not None:
        step = agreed_step(run, step, run.modules)
    elif run.counts_samples:
        step = counted_step(run, step)
    return step if run.end_step is None else bounded_step(run, step, run.end_step)


def agreed_step(run: Run, step: Callable[[Any], Any], modules: Sequence[nn.Module]) -> Callable[[Any], Any]:
    """The step with what agreement asks of it. `modules` are those whose gradients its backward passes reduce."""
    state, skips = run.state, run.skips_idle

    def agreed(batch: Any) -> Any:
        try:
            if state.active and state.group_end and state.samples:
                output = step(batch)
            elif not state.active and skips:
                output = None
            else:
                with ExitStack() as stack:
                    if not state.active or not state.samples:  # the mean over nothing is not a number
                        stack.enter_context(without_trace(modules))
                    if not state.group_end:
                        stack.enter_context(without_reduction(modules))
                    output = step(batch)
        except Exception as error:
            if run.replicas is not None:
                run.replicas.raise_explained(error, state.iteration)
            raise
        if state.group_end:
            run.steps_in_group = 0
        else:
            run.steps_in_group += 1
            state.inner_iterations += 1
        return output

    return agreed


def counted_step(run: Run, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The step of a rank that agrees with nobody, with `state.samples` for what weighs by it."""
    state = run.state

    def counted(batch: Any) -> Any:
        state.samples = run.count_batch(batch)
        return step(batch)

    return counted


@contextmanager
def without_gradient(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run a step so that the gradients it gives parameters of `modules` are zero, even those of a loss that is NaN."""
    modules = list(modules)
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    # A hook, not a factor of the loss: zero times NaN is NaN. DDP's reducer sees what the hook gives on.
    hooks = [p.register_hook(torch.zeros_like) for p in parameters.values()]  # type: ignore[no-untyped-call]
    try:
        with ExitStack() as stack:
            for module in modules:
                if is_fully_sharded(module):
                    stack.enter_context(without_gradients(module))
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
            if isinstance(module, DistributedDataParallel):  # it broadcasts buffers at the beginning of forward
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
    """Run a step whose gradients are added up on this rank and not yet reduced over ranks (`no_sync`)."""
    with ExitStack() as stack:
        for module in modules:
            no_sync = getattr(module, "no_sync", None)
            if no_sync is not None:
                stack.enter_context(no_sync())
            elif is_fully_sharded(module):
                stack.enter_context(unreduced(module))
        yield
