"""Ranks inside a test, real and simulated: what allstep's own tests use, public so that users test their scripts."""

from allstep.errors import RanksError, SimulationError
from allstep.faults import FaultPlan
from allstep.testing.ranks import run_ranks
from allstep.testing.simulated import SimulatedRank, simulate

__all__ = ["FaultPlan", "RanksError", "SimulatedRank", "SimulationError", "run_ranks", "simulate"]
