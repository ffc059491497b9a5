"""`TerminateOnNan`: the run ends when a step's output is not finite.

Contract: attached to an engine, it looks at the outputs of this rank's own iterations until it has asked for the run's
end. A rank decides alone and calls no collective; all ranks stop at the same iteration, by the end of the next window,
and `state.stop_reason` names the rank. The run has failed then: a `Checkpoint` does not save its state, so that the
run can go on from an earlier one. Looking at a tensor on a device makes the host wait for the step that computes
it: with `every=N` that happens once in N iterations, and outputs in between are not looked at. (A loss that became NaN
through its parameters stays NaN.) What is saved in between may be NaN already, so N is to be smaller than the number of
iterations that `keep_last` checkpoints reach back. On the CPU there is nothing to wait for.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from allstep.engine import Engine, Events
from allstep.engine.events import check_count


class TerminateOnNan:
    """Ends a run whose output is NaN or infinite.

    Args:
        output_transform: `output -> value`: tensors, numbers, or mappings and sequences of them. What is none of these
            is passed over. By default the whole output.
        every: look at every so many iterations.

    Raises:
        ValueError: `every` is no int of at least 1.
    """

    def __init__(self, output_transform: Callable[[Any], Any] = lambda output: output, *, every: int = 1) -> None:
        check_count("every", every, 1)
        self.output_transform = output_transform
        self.every = every
        self._has_asked = False

    def attach(self, engine: Engine) -> TerminateOnNan:
        """Look at the outputs of `engine`. Returns self."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._look)
        return self

    def _start(self) -> None:
        self._has_asked = False

    def _look(self, engine: Engine) -> None:
        if self._has_asked or engine.extension.is_idle or _is_finite(self.output_transform(engine.state.output)):
            return
        # Once: until the stop holds, further outputs are likely to be as bad.
        self._has_asked = True
        at = engine.state.iteration
        engine.logger.error("the output of iteration %d is not finite on rank %d", at, engine.coordinator.rank)
        engine.terminate(reason=f"the output of iteration {at} is not finite", outcome="failed")


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):  # here the host waits for the device
        return bool(torch.isfinite(value).all())
    if isinstance(value, float | complex):
        return cmath.isfinite(value)
    if isinstance(value, Mapping):
        return all(_is_finite(part) for part in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(_is_finite(part) for part in value)
    return True
