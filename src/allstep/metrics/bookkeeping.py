"""What is known here of how torchmetrics keeps a metric: its private attributes, and which code is its own.

Contract: facts about torchmetrics' `Metric`, in one place, since a release of it may change them.
"""

from __future__ import annotations

from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric

# Of a computation: what `compute` and the synchronisation in it change.
COMPUTING = ("_update_count", "_computed", "_to_sync", "_is_synced", "_cache", "_forward_cache", "_should_unsync")

# What torchmetrics keeps of a metric beside its states; an update changes it on every rank for itself.
BOOKKEEPING = frozenset({*COMPUTING, "_enable_grad", "_device", "_dtype", "training", "compute_on_cpu"})

# What it puts around a metric's methods when the metric is made.
WRAPPED = frozenset({"update", "compute", "_update_signature"})

_KNOWN_PACKAGES = ("torchmetrics", "allstep")

# torchmetrics' detection metrics override `_sync_dist` only because their lists hold tuples too.
_PLAIN_LISTS = frozenset({"torchmetrics.detection.mean_ap", "torchmetrics.detection._mean_ap"})


def is_known(module: str) -> bool:
    """Whether code of this module is torchmetrics' or allstep's own, and not a user's."""
    return module.partition(".")[0] in _KNOWN_PACKAGES


def syncs_itself(metric: Metric) -> bool:
    """Whether a metric brings a way of its own to reduce its states over ranks."""
    own = type(metric)._sync_dist
    needed = own is not Metric._sync_dist and own.__module__ not in _PLAIN_LISTS
    return (needed and not isinstance(metric, CompositionalMetric)) or metric.dist_sync_fn is not None
