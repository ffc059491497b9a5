"""Metrics over all ranks: torchmetrics' definitions, reduced exactly and in one collective."""

from allstep.metrics.frechet import FrechetDistance
from allstep.metrics.metrics import Metrics
from allstep.metrics.running import Max, Mean, Min, Sum
from allstep.metrics.usage import EPOCH, ITERATION, RUN, RUNNING, Usage

__all__ = [
    "EPOCH",
    "ITERATION",
    "RUN",
    "RUNNING",
    "FrechetDistance",
    "Max",
    "Mean",
    "Metrics",
    "Min",
    "Sum",
    "Usage",
]
