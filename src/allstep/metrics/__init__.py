"""Metrics over all ranks: torchmetrics' definitions, reduced exactly and in one collective."""

from allstep.metrics.gathering import Gather
from allstep.metrics.generative import FrechetDistance
from allstep.metrics.metrics import Metrics
from allstep.metrics.parts import Parts
from allstep.metrics.running import Max, Mean, Min, Sum
from allstep.metrics.usage import EPOCH, ITERATION, RUN, RUNNING, Usage

__all__ = [
    "EPOCH",
    "ITERATION",
    "RUN",
    "RUNNING",
    "FrechetDistance",
    "Gather",
    "Max",
    "Mean",
    "Metrics",
    "Min",
    "Parts",
    "Sum",
    "Usage",
]
