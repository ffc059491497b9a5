"""Each rank's and each worker's part of a stream that cannot be indexed.

Contract: inside an `IterableDataset.__iter__` a user writes `for x in shard(self.source)`. The loader wraps the dataset
in `PlacedIterable`, which travels to the workers with it and sets the place (rank, world size) only while the dataset's
own code runs, so that `shard` finds it in any process; the worker's number comes from torch. Every element of the
source goes to exactly one worker of one rank, provided that all see the same source in the same order. Each of them
still reads the whole source, and only keeps its part. Without allstep's loader the place is given as arguments; where
it is neither given nor plainly a world of one, `shard` raises instead of repeating data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from allstep.data.epochs import tell_epoch
from allstep.errors import DataError

T = TypeVar("T")

_place: ContextVar[tuple[int, int] | None] = ContextVar("allstep_data_place", default=None)


def shard(iterable: Iterable[T], *, rank: int | None = None, world_size: int | None = None) -> Iterator[T]:
    """Elements of `iterable` that belong to this worker of this rank: every (world_size * workers)-th.

    For use in an `IterableDataset.__iter__` that a loader of allstep iterates; elsewhere give `rank` and `world_size`.
    Raises DataError when only one is given, or neither and the place is unknown.
    """
    rank, world_size = _resolve(rank, world_size)
    worker = get_worker_info()
    workers = worker.num_workers if worker else 1
    return islice(iterable, rank * workers + (worker.id if worker else 0), None, world_size * workers)


def _resolve(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise DataError(f"shard(rank={rank}, world_size={world_size}): give both or neither")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise DataError(f"shard(rank={rank}, world_size={world_size}): rank must lie in [0, world_size)")
        return rank, world_size
    place = _place.get()
    if place is not None:
        return place
    # Elements would be read once a rank or worker, unnoticed, if this guessed a world of one.
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if get_worker_info() is not None or (grouped and torch.distributed.get_world_size() > 1):
        raise DataError(
            "shard() does not know this process' rank: iterate the dataset through world.loader(...), "
            "or call shard(iterable, rank=..., world_size=...)"
        )
    return 0, 1


class PlacedIterable(IterableDataset[Any]):
    """An iterable dataset that knows its rank; reads as the dataset it wraps, which is `source`.

    `set_epoch` reaches the copies of the dataset in running workers: each tells the source, or the datasets inside it
    that have `set_epoch`, when its next iteration begins.
    """

    def __init__(self, source: IterableDataset[Any], rank: int, world_size: int) -> None:
        self.source = source
        self.place = (rank, world_size)
        # In shared memory, which running workers see: they were started with a copy of this object.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Underscored names are never passed on: pickle and copy ask for some before `source` is there.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.source, name)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration, in whatever process, is of this epoch."""
        self.epoch[0] = epoch

    def __iter__(self) -> Iterator[Any]:
        with _placed(self.place):
            tell_epoch(self.source, int(self.epoch))
            iterator = iter(self.source)
        return self._elements(iterator)

    def _elements(self, iterator: Iterator[Any]) -> Iterator[Any]:
        # The place is set anew for each element, since a generator's body runs in the context of whoever asks it.
        while True:
            with _placed(self.place):
                try:
                    element = next(iterator)
                except StopIteration:
                    return
            yield element


@contextmanager
def _placed(place: tuple[int, int]) -> Iterator[None]:
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)
