"""Ranks inside a test, real and simulated: what allstep's own tests use, public so that users test their scripts.

Here: `run_ranks` calls a function on real processes, which are forked for the call from a warm server; `simulate` calls
one on threads that agree through memory; `rehearse` interrupts a script as a cluster would; the pytest plugin gives the
fixtures `world_of` and `rehearse`. Not here: what a fault does
(`allstep.faults`), who failed first (`allstep.diagnosis`), and starting scripts, which is `allstep.launch`.

Names are imported when first used (PEP 562): pytest loads the plugin of this package in every project, and only
simulated ranks need torch in the test's own process.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from allstep.errors import RanksError, RehearsalError, SimulationError
    from allstep.faults import FaultPlan
    from allstep.rehearsal.rehearsal_report import RehearsalReport
    from allstep.testing.ranks import run_ranks
    from allstep.testing.rehearsed import rehearse
    from allstep.testing.simulated import SimulatedRank, simulate

_HOMES = {
    "FaultPlan": "allstep.faults",
    "RanksError": "allstep.errors",
    "RehearsalError": "allstep.errors",
    "RehearsalReport": "allstep.rehearsal.rehearsal_report",
    "SimulatedRank": "allstep.testing.simulated",
    "SimulationError": "allstep.errors",
    "rehearse": "allstep.testing.rehearsed",
    "run_ranks": "allstep.testing.ranks",
    "simulate": "allstep.testing.simulated",
}

__all__ = [
    "FaultPlan",
    "RanksError",
    "RehearsalError",
    "RehearsalReport",
    "SimulatedRank",
    "SimulationError",
    "rehearse",
    "run_ranks",
    "simulate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
