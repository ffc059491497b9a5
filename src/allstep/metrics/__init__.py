"""Metrics over all ranks: torchmetrics' definitions, reduced exactly and in one exchange at each event.

`Metrics` attaches to an engine. Read on from there: `nodes` takes what was given apart, `feeding` gives batches to it,
and `reduction` does what happens at an event, by way of `states` (which states, in which order), `packing` (as bytes),
`exchange` (to all ranks) and `folding` (to one value). `describe` is what ranks compare, `saving` what a checkpoint
keeps, `running` has allstep's own `Mean`, `Sum`, `Max` and `Min`. Definitions of metrics are torchmetrics'. Outputs of
all ranks, sample by sample, are in `allstep.outputs`.
"""

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
