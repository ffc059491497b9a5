"""A clock that knows when its service did not run, so that no rank counts as silent for that time.

A machine may be suspended, or its processes stopped, for minutes. What ranks sent meanwhile has not been read yet when
the service goes on. The service calls `driven` whenever its driver calls it; after a gap, `age` counts from its end.
"""

from __future__ import annotations

from collections.abc import Callable

_GAP_S = 3.0  # without a call of `driven`, which comes at least once a second, after which the service was not running


class DrivenClock:
    """Seconds on a clock that is never turned back, and the age of what was heard."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.now = clock
        self._driven = clock()
        self._resumed = clock()

    def driven(self) -> None:
        """The driver runs."""
        now = self.now()
        if now - self._driven > _GAP_S:
            self._resumed = now
        self._driven = now

    def age(self, heard: float) -> float:
        """Seconds since something was heard, as far as this service was there to hear more."""
        return self.now() - max(heard, self._resumed)
