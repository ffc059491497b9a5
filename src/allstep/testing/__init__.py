"""Ranks inside a test, real and simulated: what allstep's own tests use, public so that users test their scripts."""

from allstep.testing.ranks import RanksError, run_ranks
from allstep.testing.simulated import SimulatedRank, SimulationError, simulate

__all__ = ["RanksError", "SimulatedRank", "SimulationError", "run_ranks", "simulate"]
