"""Where a step ends on a device that collects work, such as XLA, in place of running it at once.

Contract: such a device gives its World a function that has it begin with what was collected
(`WorldInternals.end_step`). An engine calls it

- behind each optimizer step: after the iteration that ends an accumulation group, before its handlers. A handler that
  reads the output then waits for it and adds no graph. Where a group is long, also after every `MOST_TOGETHER`
  iterations, since a graph of all of them would take long to compile;
- before an epoch's first iteration, behind its last, and behind the handlers of EPOCH_COMPLETED, so that what is done
  once an epoch is no part of a step, and every epoch is made of the same graphs as the one before.

Elsewhere `Run.end_step` is None and the loop calls the step as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allstep.engine.run import Run

MOST_TOGETHER = 8
"""Iterations of an accumulation group that are collected into one graph at the most."""


def bounded_step(run: Run, step: Callable[[Any], Any], end_step: Callable[[], None]) -> Callable[[Any], Any]:
    """The step with its end told to the device."""
    state, collected = run.state, 0

    def bounded(batch: Any) -> Any:
        nonlocal collected
        output = step(batch)
        collected += 1
        if state.group_end or collected >= MOST_TOGETHER:
            collected = 0
            end_step()
        return output

    return bounded
