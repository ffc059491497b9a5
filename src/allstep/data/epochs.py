"""Telling a dataset the epoch, wherever in it the code stands that wants to know.

Contract: whoever begins a pass over a dataset calls `tell_epoch` with the epoch, counted from 0. A dataset that has
`set_epoch` is told; of one that has not, those it is made of are looked at: `dataset` of a subset or a wrapper,
`datasets` of a concatenation, a chain or a stack. Nothing else is touched. `wants_epoch` says whether anybody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset

_DEEPEST = 8  # datasets in datasets; one that holds itself would be looked at for ever


def tell_epoch(dataset: Any, epoch: int) -> None:
    """Call `set_epoch(epoch)` of a dataset, or of those inside that have it."""
    for hook in _hooks(dataset):
        hook(epoch)


def wants_epoch(dataset: Any) -> bool:
    """Whether a dataset, or one inside it, has `set_epoch`."""
    return next(_hooks(dataset), None) is not None


def _hooks(dataset: Any, depth: int = 0) -> Iterator[Callable[[int], object]]:
    hook = getattr(dataset, "set_epoch", None)
    if callable(hook):
        yield hook
        return
    if not isinstance(dataset, Dataset) or depth == _DEEPEST:
        return
    inner = getattr(dataset, "datasets", None)
    several = inner.values() if isinstance(inner, Mapping) else inner if isinstance(inner, list | tuple) else ()
    for each in (getattr(dataset, "dataset", None), *several):
        if each is not None:
            yield from _hooks(each, depth + 1)
