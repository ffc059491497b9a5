"""Names that torch does not promise to keep, for `data`: each with a feature test and a way to go on without it.

It was there before torch 2.9, the oldest that allstep supports.

| name | what for | without it |
| --- | --- | --- |
| _MultiProcessingDataLoaderIter._workers | the worker processes of an iterator | those started with it |
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Collection, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

_warned: set[str] = set()


def child_processes() -> frozenset[BaseProcess]:
    """The processes that `multiprocessing` has started for this one and that run; to be given to `workers_of`."""
    return frozenset(multiprocessing.active_children())


def workers_of(iterator: Any, num_workers: int, before: Collection[BaseProcess]) -> Sequence[BaseProcess]:
    """The worker processes of a DataLoader's iterator.

    Args:
        iterator: that `iter(loader)` returned.
        num_workers: of the loader.
        before: `child_processes()` from before the iterator was made. Where torch hides the workers, those that have
            been started since are taken for them.
    """
    if num_workers == 0:
        return ()
    workers = getattr(iterator, "_workers", None)
    if workers is not None:
        return tuple(workers)
    if "_workers" not in _warned:
        _warned.add("_workers")
        warnings.warn(
            "this torch does not tell the worker processes of a DataLoader's iterator (_workers): processes that were "
            "started with it are taken for them; update allstep",
            RuntimeWarning,
            stacklevel=3,
        )
    return tuple(child_processes() - frozenset(before))
