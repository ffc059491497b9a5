"""Passes over a DataLoader whose workers live on: each independent of the others, also while they overlap.

Contract: torch gives a loader with `persistent_workers` one iterator for all of its passes, and begins it anew for
each. A pass that is under way then goes on with the batches of the other. `begin_pass` gives a second pass, while the
first is neither at its end nor forgotten, workers of its own, which end with it. Other loaders are iterated as they
are.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader


class PersistentPass(Iterator[Any]):
    """One pass over the iterator that persistent workers share.

    `is_over` once it has given all, or whoever began it will not ask it any more.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.is_over = False

    def __len__(self) -> int:
        return len(self._iterator)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self.is_over = True
            raise


# Only what is under way now, so that it goes with the loader and the pass.
_under_way: weakref.WeakKeyDictionary[DataLoader[Any], weakref.ref[PersistentPass]] = weakref.WeakKeyDictionary()


def begin_pass(loader: DataLoader[Any], iterate: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """Begin a pass over a loader; `iterate` is called for `iter(loader)`, with the loader or a copy of it."""
    if not loader.persistent_workers or not loader.num_workers:
        return iterate(loader)
    known = _under_way.get(loader)
    before = None if known is None else known()
    if before is not None and not before.is_over:
        own = copy.copy(loader)
        vars(own)["persistent_workers"] = False  # torch refuses to set it after the loader was made
        return iterate(own)
    begun = PersistentPass(iterate(loader))
    _under_way[loader] = weakref.ref(begun)
    return begun
