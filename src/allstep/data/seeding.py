"""Random augmentation that depends on the sample's place in the epoch, not on who loads it.

Contract: the loader wraps a map-style dataset in `SeededDataset`; DataLoader's fetcher, in a worker or in the main
process, hands it an `IndexBatch`, which says epoch and position. Before each sample (or each batch) Python's `random`,
numpy's legacy global generator and torch's default CPU generator are seeded from (seed, epoch, position). Collation
happens here too, and goes on from the last seed. In the main process the three generators are put back afterwards, also
when the dataset raises; a worker process has its own, and they stay as they are. Generators of other devices and those
that a dataset owns are not touched. A dataset that has `set_epoch` is told the epoch of each batch before that is
loaded, in whatever process it is, so that workers which live on and passes that overlap hear of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, get_worker_info

from allstep.data.epochs import tell_epoch, wants_epoch
from allstep.data.generators import generators_kept, seed_cpu_generators
from allstep.data.keys import key_of, stream
from allstep.data.sampler import IndexBatch

SampleSeeding = Literal["sample", "batch", "off"]

_SAMPLES = 1  # sets the seeds of samples apart from other keys of the same seed and epoch


class SeededDataset(Dataset[Any]):
    """A map-style dataset that seeds before it loads; reads as the dataset it wraps, which is `source`.

    `collate` turns a list of samples into a batch. Attributes it does not have come from `source`.
    """

    def __init__(
        self, source: Dataset[Any], collate: Callable[[list[Any]], Any], *, seed: int, seeding: SampleSeeding
    ) -> None:
        self.source = source
        self.collate = collate
        self.seed = seed
        self.seeding = seeding
        self._told: int | None = None if wants_epoch(source) else -1  # -1 where nobody listens

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self.source[index]

    def __getattr__(self, name: str) -> Any:
        # Underscored names are never passed on: pickle and copy ask for some before `source` is there.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.source, name)

    def tell_epoch(self, epoch: int) -> None:
        """Tell the dataset the epoch, if it wants to know and was told another one last."""
        if self._told != -1 and self._told != epoch:
            self._told = epoch
            tell_epoch(self.source, epoch)

    def __getitems__(self, batch: IndexBatch) -> Any:
        """The collated batch for the indices in `batch`."""
        self.tell_epoch(batch.epoch)
        if self.seeding == "off":
            return self.collate(self._fetch(list(batch)))
        # A worker draws for nothing else, so its generators need not be put back.
        if get_worker_info() is not None:
            return self._load(batch)
        with generators_kept():
            return self._load(batch)

    def _load(self, batch: IndexBatch) -> Any:
        key = key_of(self.seed, batch.epoch, _SAMPLES)
        if self.seeding == "sample":
            samples = []
            for index, sample_key in zip(batch, stream(key, batch.position, len(batch)).tolist(), strict=True):
                seed_cpu_generators(sample_key)
                samples += self._fetch([index])
        else:
            seed_cpu_generators(int(stream(key, batch.position, 1)[0]))
            samples = self._fetch(list(batch))
        return self.collate(samples)

    def _fetch(self, indices: list[int]) -> list[Any]:
        # A dataset that fetches many at once does it better than one by one; it does so for one, too.
        fetch_many = getattr(self.source, "__getitems__", None)
        if fetch_many:
            samples: list[Any] = fetch_many(indices)
            return samples
        return [self.source[index] for index in indices]


def fetches_batches(dataset: Dataset[Any]) -> bool:
    """Whether a dataset fetches many samples at once by its own `__getitems__`."""
    while isinstance(dataset, Subset):  # it has one for whatever it is a part of
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


_STILL = (torch.Tensor, np.ndarray, TensorDataset, list, tuple, range)


def draws_nothing(dataset: Any) -> bool:
    """Whether a dataset surely hands out what it holds, so that there is nothing to seed: tensors, arrays, lists."""
    kind = type(dataset)  # exactly: a subclass may augment
    if kind is Subset:
        return draws_nothing(dataset.dataset)
    if kind is ConcatDataset:
        return all(map(draws_nothing, dataset.datasets))
    return kind in _STILL


def keep_collated(batch: Any) -> Any:
    """DataLoader's `collate_fn` for a dataset that collates by itself."""
    return batch
