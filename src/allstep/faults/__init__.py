"""Faults that a run can be told to rehearse, by the environment variable ALLSTEP_FAULT. Standard library only.

`fault` has the kinds of fault and what one is, `plan` the plan and its text, `inject` carries faults out. Where a rank
asks for them is in `allstep.world` and `allstep.engine`; what the others make of a failure is in `allstep.diagnosis`.
"""

from allstep.faults.fault import Fault, RankPosition
from allstep.faults.inject import active, forget, strike
from allstep.faults.plan import VARIABLE, FaultPlan

__all__ = ["VARIABLE", "Fault", "FaultPlan", "RankPosition", "active", "forget", "strike"]
