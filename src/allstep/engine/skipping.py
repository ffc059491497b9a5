"""`state.skip()`: a batch that counts for nothing on this rank, while all ranks go on together.

Contract: a step, or a handler before it, calls it when the batch turns out to be bad. The step then goes on to its
backward pass, because the other ranks wait for this one there. Until the iteration ends, gradients that reach the
parameters of trained modules are zero, even those of a loss that is NaN, and the state says that this rank has no
batch: weight 0, no samples, not active. So metrics leave it out. The weights of the other ranks stay as agreed: the
gradient is that of all samples of the group, where those skipped add nothing.

Called before the forward pass, it leaves no trace in buffers either. After it, buffers keep what the forward pass has
made of them. Where that is not finite and DDP does not replace it by rank 0's, the end of the iteration raises an
error, because BatchNorm's statistics would stay NaN for ever.

The end of the iteration, or an exception, takes all of this back (`end_skip`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from allstep.engine.dummy_step import without_trace
from allstep.engine.run import LOOK_NOW, Run
from allstep.errors import EngineError
from allstep.parallel import broadcasts_buffers, unwrap


@dataclass(slots=True)
class SkippedBatch:
    """What is to be taken back when the iteration ends."""

    stack: ExitStack
    before: tuple[float, bool, int | None]
    had_finite_buffers: bool


def skip_of(run: Run) -> Callable[[], None]:
    """`skip` for the state of `run`, which does not keep the run alive.

    In a cycle, data and batches of an engine that is gone would wait for Python's collector, and a loader with
    persistent workers cannot end them there.
    """
    reference = weakref.ref(run)
    return lambda: skip(reference())


def skip(run: Run | None) -> None:
    """Have this rank's present batch count for nothing; see the module. A second call in one iteration does nothing."""
    if run is None or not run.is_running:
        raise EngineError("state.skip() was called outside a run; call it in the step, for the batch that it was given")
    if run.skipped is not None:
        return
    state, stack = run.state, ExitStack()
    stack.enter_context(without_trace(run.modules))
    run.skipped = SkippedBatch(stack, (state.weight, state.active, state.samples), not _non_finite(run))
    state.weight, state.active, state.samples = 0.0, False, 0
    run.until = LOOK_NOW


def end_skip(run: Run, *, failed: bool = False) -> None:
    """The iteration is over, or has `failed`: gradients are what they are again.

    Raises:
        EngineError: the skipped batch has made buffers NaN or infinite for good.
    """
    skipped, run.skipped = run.skipped, None
    if skipped is None:
        return
    skipped.stack.close()
    state = run.state
    state.weight, state.active, state.samples = skipped.before
    if not failed and not skipped.had_finite_buffers and (spoiled := _non_finite(run)):
        raise EngineError(
            f"the batch of iteration {state.iteration} was skipped after its forward pass, which has made buffers of "
            f"the model NaN or infinite: {', '.join(spoiled[:5])}. Call state.skip() before the forward pass, when the "
            "inputs show it, or have such batches count for nothing by Engine(samples_in=...)"
        )


def _non_finite(run: Run) -> list[str]:
    """Names of buffers that are not finite and are not replaced by another rank's."""
    rank = run.coordinator.rank
    return [
        name
        for module in run.modules
        if rank == 0 or not broadcasts_buffers(module)
        for name, buffer in unwrap(module).named_buffers()
        if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all())
    ]
