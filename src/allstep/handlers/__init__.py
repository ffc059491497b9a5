"""Handlers that attach to an engine: what decides when a run has done enough, what changes and what shows how it goes.

What lives here: small classes with an `attach` that gives back the handler itself. A rank decides alone and asks
`Engine.terminate`; none calls a collective while a run goes on. What does not: how a stop is agreed and where it holds
(`engine`), what is saved then (`checkpoint`), and metrics that a decision looks at (`metrics`).
"""

from allstep.handlers.early_stopping import EarlyStopping
from allstep.handlers.gradient_clipping import GradientClipping
from allstep.handlers.preemption import Preemption
from allstep.handlers.progress_bar import ProgressBar
from allstep.handlers.schedule import Schedule
from allstep.handlers.stop_on_signal import StopOnSignal
from allstep.handlers.terminate_on_nan import TerminateOnNan
from allstep.handlers.time_limit import TimeLimit

__all__ = [
    "EarlyStopping",
    "GradientClipping",
    "Preemption",
    "ProgressBar",
    "Schedule",
    "StopOnSignal",
    "TerminateOnNan",
    "TimeLimit",
]
