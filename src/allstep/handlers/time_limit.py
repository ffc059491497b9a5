"""`TimeLimit`: the run ends when its time is up.

Contract: attached to an engine, it starts its clock when a run starts and looks at it after every iteration and epoch.
Clocks of ranks differ: the first rank whose time is up asks, and all stop at the same iteration, by the end of the next
window. So a limit is passed by up to two windows, about two seconds, or by one iteration that takes longer. The
run is not finished then: started again, it goes on from its checkpoint with the whole limit before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from allstep.engine import Engine, Events
from allstep.errors import ArgumentError


class TimeLimit:
    """Ends a run after some time.

    Args:
        limit: seconds, or a timedelta, from the run's start; more than 0. A run that was suspended goes on with the
            time that had passed, suspended or not.
        clock: seconds that never go back.

    Raises:
        ValueError: the limit is not positive.
    """

    def __init__(self, limit: float | timedelta, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = limit.total_seconds() if isinstance(limit, timedelta) else float(limit)
        if not self.seconds > 0:
            raise ArgumentError(f"limit is {limit!r}; it must be more than 0 seconds")
        self._clock = clock
        self._ends_at = float("inf")

    def attach(self, engine: Engine) -> TimeLimit:
        """Limit the runs of `engine`, each anew. Returns self."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED, self._look)
        return self

    def _start(self) -> None:
        self._ends_at = self._clock() + self.seconds

    def _look(self, engine: Engine) -> None:
        if self._clock() >= self._ends_at:
            self._ends_at = float("inf")  # it is asked for once; the stop holds some iterations later
            engine.terminate(reason=f"time limit of {self.seconds:g} s")
