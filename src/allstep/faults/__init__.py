"""Faults that a run can be told to rehearse, by the environment variable ALLSTEP_FAULT. Standard library only."""

from allstep.faults.fault import Fault, Here
from allstep.faults.plan import VARIABLE, FaultPlan
from allstep.faults.striking import active, forget, strike

__all__ = ["VARIABLE", "Fault", "FaultPlan", "Here", "active", "forget", "strike"]
