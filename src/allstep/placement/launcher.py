"""What every launcher's file answers: is this one of yours, and if so, where is it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from allstep.placement.placement import Placement


class LauncherEnvironment(Protocol):
    """One way in which processes are started, told by its environment variables. Both methods are pure."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether variables of this launcher are there, however broken."""
        ...

    def place(self, environ: Mapping[str, str]) -> Placement:
        """The process's place; raises PlacementError where the variables are missing, garbage or contradictory."""
        ...
