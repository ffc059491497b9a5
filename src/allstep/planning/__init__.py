"""What a model takes on a rank, before any rank is there: memory, messages, and what would fit a given device.

A training step runs on tensors without values, by one process that stands for the first of any number of ranks. What
does not live here: how a model is put over ranks (`parallel`), which is what runs, and the command (`cli`).
"""

from allstep.planning.absent_ranks import Training, Wrapping
from allstep.planning.memory_plan import MemoryUse, Plan, Traffic, bytes_of
from allstep.planning.planned_step import planned
from allstep.planning.what_fits import plan_that_fits

__all__ = ["MemoryUse", "Plan", "Traffic", "Training", "Wrapping", "bytes_of", "plan_that_fits", "planned"]
