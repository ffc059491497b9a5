"""`GarbageCollection`: Python's garbage collector runs at the same iteration on all ranks, and at no other time.

Contract: attached on every rank alike. While a run is under way the collector does not start by itself, at a moment of
its own on each rank, for which all others wait; it runs each so many iterations, counted alike everywhere. When the run
ends, by an exception too, it is as it was before. What can go wrong: a step that makes very many reference cycles fills
memory until the next collection; choose a smaller `every`.
"""

from __future__ import annotations

import gc
from typing import Any

from allstep.engine import Engine, Events
from allstep.engine.events import check_count
from allstep.errors import ArgumentError


class GarbageCollection:
    """Collects garbage on all ranks at once.

    Args:
        every: iterations between one collection and the next.
        generation: the oldest generation that is collected, 0 to 2; 2 is all.

    Raises:
        ArgumentError: every is no int of at least 1, or there is no such generation.
    """

    def __init__(self, every: int = 1000, *, generation: int = 2) -> None:
        check_count("every", every, 1)
        if generation not in (0, 1, 2):
            raise ArgumentError(f"generation is {generation!r}; it must be 0, 1 or 2")
        self.every = every
        self.generation = generation
        self._was_enabled = False

    def attach(self, engine: Engine) -> GarbageCollection:
        """Collect in the runs of `engine`. Returns self."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._collect)
        ends = Events.COMPLETED | Events.TERMINATE | Events.INTERRUPT | Events.EXCEPTION_RAISED
        engine.add_event_handler(ends, self._end)
        return self

    def _start(self) -> None:
        self._was_enabled = gc.isenabled() or self._was_enabled
        gc.disable()
        gc.collect()  # what was made before the run is looked at once, and is old from then on

    def _collect(self) -> None:
        gc.collect(self.generation)

    def _end(self, *_: Any) -> None:
        if self._was_enabled:
            self._was_enabled = False
            gc.enable()
