"""Handlers that attach to an engine: what decides when a run has done enough, what changes and what shows how it goes.

What lives here: small classes with an `attach` that gives back the handler itself. A rank decides alone and asks
`Engine.terminate`; none calls a collective while a run goes on. What does not: how a stop is agreed and where it holds
(`engine`), what is saved then (`checkpoint`), and metrics that a decision looks at (`metrics`).
"""

from allstep.handlers.averaging import EMA, SWA, AveragedWeights
from allstep.handlers.batch_size_finder import BatchSizeFinder, BatchSizes
from allstep.handlers.device_stats import DeviceStats
from allstep.handlers.early_stopping import EarlyStopping
from allstep.handlers.evaluate import Evaluate
from allstep.handlers.freeze import Freeze
from allstep.handlers.garbage_collection import GarbageCollection
from allstep.handlers.gradient_clipping import GradientClipping
from allstep.handlers.lr_finder import LRCurve, LRFinder
from allstep.handlers.output_store import OutputStore
from allstep.handlers.preemption import Preemption
from allstep.handlers.profiler import Profiler
from allstep.handlers.progress_bar import ProgressBar
from allstep.handlers.save_best import SaveBest
from allstep.handlers.schedule import Schedule
from allstep.handlers.stop_on_signal import StopOnSignal
from allstep.handlers.terminate_on_nan import TerminateOnNan
from allstep.handlers.throughput import Throughput
from allstep.handlers.time_limit import TimeLimit
from allstep.handlers.time_profiler import TimeProfiler
from allstep.handlers.timer import Timer

__all__ = [
    "EMA",
    "SWA",
    "AveragedWeights",
    "BatchSizeFinder",
    "BatchSizes",
    "DeviceStats",
    "EarlyStopping",
    "Evaluate",
    "Freeze",
    "GarbageCollection",
    "GradientClipping",
    "LRCurve",
    "LRFinder",
    "OutputStore",
    "Preemption",
    "Profiler",
    "ProgressBar",
    "SaveBest",
    "Schedule",
    "StopOnSignal",
    "TerminateOnNan",
    "Throughput",
    "TimeLimit",
    "TimeProfiler",
    "Timer",
]
