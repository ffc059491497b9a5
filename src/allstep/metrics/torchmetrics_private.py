"""The private names of torchmetrics that metrics over ranks need, and one of torch, each behind one function.

Contract: no other module of this package uses a name of torchmetrics or torch that begins with an underscore. Each
function says what it is for, in which releases the name is, and what happens where a release lacks it: a public
way that costs more or shares less, with one warning a process, or a `MetricError` that names the release. An
AttributeError never leaves this module. Names are looked for on the object at hand, at each use that is not in a loop
over batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import torchmetrics
from torchmetrics import Metric, MetricCollection
from torchmetrics.metric import CompositionalMetric

from allstep.errors import MetricError

_LOG = logging.getLogger("allstep.metrics")
_LIBRARY_PACKAGES = ("torchmetrics", "allstep")

# torchmetrics' detection metrics override `_sync_dist` only because their lists may hold tuples, which travel here as
# any other object does.
_KNOWN_SYNCS = frozenset({"torchmetrics.detection.mean_ap", "torchmetrics.detection._mean_ap"})

# Methods that torchmetrics' classes call from `compute` alone: retrieval metrics compute each query with `_metric`.
COMPUTE_ONLY_METHODS = frozenset({"_metric"})

# Modules whose classes and functions draw no random numbers, in torchmetrics 1.8 to 1.9, as their sources show.
DRAWING_NOTHING = (
    *("torchmetrics.aggregation", "torchmetrics.classification", "torchmetrics.regression", "torchmetrics.retrieval"),
    "allstep.metrics.running",
)


def is_library_class(kind: type) -> bool:
    """Whether a class is torchmetrics' or allstep's own, so that how it keeps what it counts is known."""
    return is_library_module(kind.__module__)


def is_library_module(name: str) -> bool:
    """Whether a module is part of torchmetrics or allstep."""
    return name.partition(".")[0] in _LIBRARY_PACKAGES


def is_library_callable(value: Callable[..., Any]) -> bool:
    """Whether a function or object that can be called comes from torchmetrics, allstep or torch."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return is_library_module(module) or module.partition(".")[0] == "torch"


def state_defaults(metric: Metric) -> Mapping[str, torch.Tensor | list[Any]]:
    """A metric's states by name, with the values that `reset` gives them.

    `_defaults`, in torchmetrics 1.8 to 1.9. Without it a copy of the metric is reset, and its public `metric_state`
    read, which costs the memory of the copy.
    """
    found = getattr(metric, "_defaults", None)
    if isinstance(found, dict):
        return found
    warn_once("Metric._defaults", "each metric is copied once to learn how its states begin")
    # A copy, since `reset` would forget what the metric holds.
    copy = deepcopy(metric)
    copy.reset()
    return copy.metric_state


def state_reductions(metric: Metric) -> Mapping[str, Any]:
    """How each state of a metric is reduced over ranks: a function, or None.

    `_reductions`, in torchmetrics 1.8 to 1.9. Nothing public says it, so that without it metrics cannot be reduced.

    Raises:
        MetricError: this torchmetrics does not have it.
    """
    found = getattr(metric, "_reductions", None)
    if not isinstance(found, dict):
        raise _lacking("Metric._reductions", "how states are reduced over ranks is not known")
    return found


def set_update_count(metric: Metric, count: int) -> None:
    """Have a metric say, by its public `update_count`, that it took `count` batches.

    `_update_count`, in torchmetrics 1.8 to 1.9. A metric that says 0 counts as one that saw nothing, so that a wrong
    number would lose data; without the name nothing can be set.

    Raises:
        MetricError: this torchmetrics does not have it.
    """
    # Through the dictionary, since torch's modules make `setattr` slow, and this runs at every event.
    if "_update_count" not in vars(metric):
        raise _lacking("Metric._update_count", "the number of batches of a metric cannot be set")
    vars(metric)["_update_count"] = count


def forget_result(metric: Metric) -> None:
    """Have a metric compute again though it has computed since its last batch.

    `_computed`, in torchmetrics 1.8 to 1.9. Without it see `prepare_to_compute`.
    """
    if "_computed" in vars(metric):
        vars(metric)["_computed"] = None


def prepare_to_compute(metric: Metric) -> None:
    """See to it that `forget_result` will hold; to be called before the metric computes anything.

    Where there is no `_computed` the metric keeps no result at all, by torchmetrics' public `compute_with_cache`.
    """
    if "_computed" not in vars(metric):
        warn_once("Metric._computed", "metrics keep no result, so that each compute() of yours computes anew")
        metric.compute_with_cache = False


class _BareMetric(Metric):
    """A metric with nothing of its own, to see what torchmetrics keeps in each."""

    def update(self) -> None:
        """Take nothing in."""

    def compute(self) -> None:
        """Give nothing."""


@cache
def bookkeeping() -> frozenset[str]:
    """Attributes that torchmetrics itself keeps in each metric, in whatever release: the options, counts and caches.

    They are read off a metric that has nothing else, so that no private name has to be known here.
    """
    return frozenset(vars(_BareMetric()))


@cache
def compute_bookkeeping() -> frozenset[str]:
    """Those of these attributes that computing may change, as far as torchmetrics and not torch keeps them."""
    return bookkeeping() - vars(torch.nn.Module()).keys()


def overrides_sync(metric: Metric) -> bool:
    """Whether a metric's class has code of its own for states over ranks that is not known here.

    `_sync_dist`, in torchmetrics 1.8 to 1.9. Where a release lacks it no class can override it, and the answer is no.
    """
    plain = getattr(Metric, "_sync_dist", None)
    own = getattr(type(metric), "_sync_dist", plain)
    return own is not plain and own.__module__ not in _KNOWN_SYNCS and not isinstance(metric, CompositionalMetric)


def sorts_keywords_itself(metric: Metric) -> bool:
    """Whether a metric's class decides for itself which keyword arguments its `update` takes.

    `_filter_kwargs`, in torchmetrics 1.8 to 1.9. Without it the signature of `update` decides for all.
    """
    plain = getattr(Metric, "_filter_kwargs", None)
    return getattr(type(metric), "_filter_kwargs", plain) is not plain


_GROUP_NAMES = ("_enable_compute_groups", "_groups", "_groups_checked", "_state_is_copy")


def asked_groups(collection: MetricCollection) -> bool | Sequence[Sequence[str]]:
    """What a collection was made with as `compute_groups`: whether members may share states, or which do.

    `_enable_compute_groups`, `_groups`, `_groups_checked`, `_state_is_copy` and `_compute_groups_create_state_ref`,
    in torchmetrics 1.8 to 1.9. Where one is missing no members share states: each is fed and travels for itself.
    """
    if all(hasattr(collection, name) for name in (*_GROUP_NAMES, "_compute_groups_create_state_ref")):
        asked: bool | list[list[str]] = collection._enable_compute_groups
        return asked
    warn_once("MetricCollection._groups", "members of a collection do not share states, and each is fed for itself")
    return False


def set_compute_groups(collection: MetricCollection, groups: Sequence[Sequence[str]]) -> None:
    """Put groups of member names in the place of a collection's compute groups; what its members hold stays.

    Only for collections for which `asked_groups` said that members may share.
    """
    collection._compute_groups_create_state_ref(copy=True)  # members of the groups so far hold the same tensors
    collection._groups = {at: list(names) for at, names in enumerate(groups)}
    collection._groups_checked = True
    collection._state_is_copy = False


def keep_states_apart(collection: MetricCollection) -> None:
    """Have the members of a collection compute from what each holds, and not from what the first of its group holds.

    `_state_is_copy`, in torchmetrics 1.8 to 1.9; without it no members share, and there is nothing to do.
    """
    if hasattr(collection, "_state_is_copy"):
        collection._state_is_copy = True


def write_count(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place, so that a change shows without a copy to compare with.

    torch's `Tensor._version`, in torch 2.9 to 2.13. Tensors made in inference mode have none. Without it only a tensor
    that is put in the place of another is seen.
    """
    if tensor.is_inference():
        return 0
    count = getattr(tensor, "_version", None)
    if count is None:
        warn_once("Tensor._version", "tensors that an update writes to in place are not seen to change")
        return 0
    return int(count)


def _lacking(name: str, consequence: str) -> MetricError:
    return MetricError(
        f"torchmetrics {torchmetrics.__version__} has no {name}, so that {consequence}. Install a release that allstep "
        "was tested with: 1.8 to 1.9"
    )


@cache
def warn_once(name: str, consequence: str) -> None:
    """Log, once a process, that a private name is missing and what that means."""
    _LOG.warning(
        "%s is missing in torch %s with torchmetrics %s: %s",
        name,
        torch.__version__,
        torchmetrics.__version__,
        consequence,
    )
