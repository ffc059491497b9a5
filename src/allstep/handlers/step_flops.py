"""How many floating-point operations a step does: counted by torch in one iteration of a run.

Contract: the first iteration in which this rank has a batch is counted, by torch's FlopCounterMode: what matrix
products, convolutions and attention in that step do, backward included, whatever it is done for; a model that
recomputes activations counts that too. The step is slower meanwhile, so it is not counted again. What can go wrong: a
compiled model shows no operations, so nothing is counted and the log says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from allstep.engine import Engine, Events


class StepFlops:
    """Counts the operations of one step of this rank.

    Args:
        units: how many samples, or whatever operations are counted for, the present batch has; asked after the step.
        unit: what these are called.

    Attributes:
        per_unit: operations for one unit; None while unknown.
    """

    def __init__(self, units: Callable[[], int], unit: str) -> None:
        self.per_unit: float | None = None
        self._units = units
        self._unit = unit
        self._counter: FlopCounterMode | None = None

    def attach(self, engine: Engine) -> StepFlops:
        """Count in a run of `engine`. Returns self."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._leave)
        return self

    def _begin(self, engine: Engine) -> None:
        if engine.state.active and self._counter is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, *_: Any) -> int:
        counter, self._counter = self._counter, None
        if counter is None:
            return 0
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return int(counter.get_total_flops())

    def _end(self, engine: Engine) -> None:
        if self._counter is None:
            return
        counted, units = self._leave(), self._units()
        if units <= 0:
            return
        if counted:
            self.per_unit = counted / units
        else:
            engine.logger.warning(
                "no floating-point operation was counted in iteration %d, as with a compiled model: give "
                "Throughput(flops=...) their number for one of %s",
                engine.state.iteration,
                self._unit,
            )
        engine.remove_event_handler(self._begin, Events.ITERATION_STARTED)  # each further call would cost something
        engine.remove_event_handler(self._end, Events.ITERATION_COMPLETED)
