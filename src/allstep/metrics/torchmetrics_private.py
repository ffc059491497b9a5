"""What is known here of how torchmetrics keeps a metric: its private attributes, and which code is its own.

Contract: facts about torchmetrics' `Metric`, in one place, since a release of it may change them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, cast

from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric

# Of a computation: what `compute` and the synchronisation in it change.
COMPUTING = ("_update_count", "_computed", "_to_sync", "_is_synced", "_cache", "_forward_cache", "_should_unsync")

# What torchmetrics keeps of a metric beside its states; an update changes it on every rank for itself.
BOOKKEEPING = frozenset({*COMPUTING, "_enable_grad", "_device", "_dtype", "training", "compute_on_cpu"})

# What it puts around a metric's methods when the metric is made.
WRAPPED = frozenset({"update", "compute", "_update_signature"})

# All that the function which it puts around an `update` reads, calls and sets, as `updating` does in its place.
_AROUND_UPDATE = frozenset(
    {
        *("_computed", "_update_count", "torch", "set_grad_enabled", "_enable_grad"),
        *("RuntimeError", "str", "__class__", "__name__", "compute_on_cpu", "_move_list_states_to_cpu"),
    }
)

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


def inside_update(metric: Metric) -> Callable[..., Any] | None:
    """A metric's `update` as its class has it, inside of the function that torchmetrics put around it.

    None where something else is around it: a user's function, nothing at all as in wrappers, or what another release
    of torchmetrics does there.
    """
    around, kind = vars(metric).get("update"), cast(Any, type(metric))
    if not isinstance(around, FunctionType) or around.__code__ not in _known_around(Metric._wrap_update.__code__):
        return None
    inside: Callable[..., Any] | None = getattr(around, "__wrapped__", None)
    is_its_own = getattr(inside, "__self__", None) is metric and kind.__setattr__ is Metric.__setattr__
    return inside if is_its_own else None


def _known_around(making: CodeType) -> list[CodeType]:
    """Functions that `making` defines and that do no more than is known."""
    inner = [constant for constant in making.co_consts if isinstance(constant, CodeType)]
    return [code for code in inner if _AROUND_UPDATE.issuperset(code.co_names)]
