"""Faults that a run can be told to rehearse, by the environment variable ALLSTEP_FAULT. Standard library only."""

from allstep.faults.fault import Fault, Here
from allstep.faults.inject import active, forget, strike
from allstep.faults.plan import VARIABLE, FaultPlan

__all__ = ["VARIABLE", "Fault", "FaultPlan", "Here", "active", "forget", "strike"]
