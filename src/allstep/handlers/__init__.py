"""What attaches to an engine's events and decides when a run has done enough."""

from allstep.handlers.early_stopping import EarlyStopping
from allstep.handlers.preemption import Preemption
from allstep.handlers.stop_on_signal import StopOnSignal
from allstep.handlers.terminate_on_nan import TerminateOnNan
from allstep.handlers.time_limit import TimeLimit

__all__ = ["EarlyStopping", "Preemption", "StopOnSignal", "TerminateOnNan", "TimeLimit"]
