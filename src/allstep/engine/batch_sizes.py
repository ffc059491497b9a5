"""How many samples and bytes the batches of a pass have: by arithmetic where that is certain, else by looking at them.

Contract: ranks that agree have to say how many samples their coming batches hold. `declared_counts` knows that without
reading for data of which each batch surely holds what its sampler dealt. All other batches are read first and counted
by a `BatchCounter`: a collate function of the user's may leave samples out, join them or make more of them. Metrics in
a world of one count with the same, so that the number is the same at any world size. `bytes_of` tells how much memory
a batch keeps while it is held. None of this changes a batch.

What can go wrong: a batch that does not show its samples, or a `samples_in` that does not count (DataError).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from operator import index
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Subset, default_collate

from allstep.data import Loader
from allstep.engine.run_plan import SamplesIn
from allstep.engine.sample_count import count_samples, undeclared
from allstep.errors import DataError

Counts = Callable[[int, int], list[int | None]]
"""`(start, stop) -> samples in the batches from start to stop`; None where there is no batch."""

_MOST_SAMPLES = (1 << 26) - 1  # of one rank in one iteration, so that the sum over 2^18 ranks fits its bits in a vote


def declared_counts(data: Any) -> tuple[Counts, int | None] | None:
    """Counts of a pass over `data` by arithmetic, and its batches; None when it has to be read to be counted."""
    if data is None:  # an endless series of None, each of which counts as one sample
        return lambda start, stop: [1] * (stop - start), None
    return dealt_counts(data) if collates_by_default(data) else None


def dealt_counts(data: Any) -> tuple[Counts, int] | None:
    """How many samples the sampler of `data` deals to this rank's batches, and the batches; None where none knows.

    A batch may hold other than what was dealt for it, where the user collates.
    """
    sampler = getattr(data, "batch_sampler", None)
    # Those of the pass that is begun: another pass over the same loader is not to change them.
    counts_of = getattr(getattr(sampler, "present_batches", sampler), "counts", None)
    if counts_of is not None and hasattr(sampler, "global_length"):
        length, rank = sampler.global_length, sampler.rank  # type: ignore[union-attr]

        def own(start: int, stop: int) -> list[int | None]:
            known = [int(n) for n in counts_of(start, min(stop, length))[:, rank]] if start < length else []
            return [*known, *[None] * (stop - start - len(known))]

        return own, length
    # Exactly torch's own class: a subclass may give batches of any size.
    if isinstance(data, DataLoader) and type(sampler) is BatchSampler:
        try:
            samples, size, length = len(data.sampler), sampler.batch_size, len(sampler)  # type: ignore[arg-type]
        except TypeError:  # an iterable dataset, or a sampler that does not know its length
            return None

        def plain(start: int, stop: int) -> list[int | None]:
            return [min(size, samples - at * size) if at < length else None for at in range(start, stop)]

        return plain, length
    return None


def collates_by_default(data: Any) -> bool:
    """Whether torch's `default_collate` makes the batches of `data`, so that each sample is a row of them."""
    if not isinstance(data, DataLoader) or data.batch_sampler is None:
        return False
    return (data.collate if isinstance(data, Loader) else data.collate_fn) is default_collate


def fetches_many(data: Any) -> bool:
    """Whether the dataset of `data` fetches the samples of a batch at once, so that it decides how many it gives."""
    dataset = data.source if isinstance(data, Loader) else getattr(data, "dataset", None)
    while isinstance(dataset, Subset):  # it has `__getitems__` whatever it is a part of
        dataset = dataset.dataset
    return hasattr(dataset, "__getitems__")


class BatchCounter:
    """Counts the batches of passes over `data`: by `samples_in` where the user gave one, else by what they show."""

    def __init__(self, data: Any, samples_in: SamplesIn | None) -> None:
        self._samples_in = samples_in
        self._default_collated = collates_by_default(data)
        dealt = dealt_counts(data)
        self._dealt = None if dealt is None else dealt[0]

    def __call__(self, batch: Any, at: int) -> int:
        """Samples in the batch with number `at` of its pass.

        Raises:
            DataError: nothing tells, or `samples_in` gives no number of samples.
        """
        if self._samples_in is not None:
            return self._by_user(self._samples_in, batch)
        dealt = self._dealt
        if dealt is None or at < 0:
            declared = undeclared
        else:

            def declared() -> int | None:
                return dealt(at, at + 1)[0]

        return count_samples(batch, declared, default_collated=self._default_collated)

    def _by_user(self, samples_in: SamplesIn, batch: Any) -> int:
        try:
            counted = samples_in(batch)
        except StopIteration as error:  # would be taken for the end of data
            raise DataError("samples_in raised StopIteration; it must return the samples in a batch") from error
        try:
            samples = index(counted)
        except TypeError:
            raise DataError(f"samples_in returned {counted!r}; it must return the samples in a batch, an int") from None
        if not 0 <= samples <= _MOST_SAMPLES:
            raise DataError(f"samples_in returned {samples}; it must be from 0 to {_MOST_SAMPLES}")
        return samples


_MOST_PARTS = 64  # of a sequence that are looked at: a vote is not to wait for a walk through a list of 10^5 strings


def bytes_of(value: Any) -> float:
    """About how many bytes the tensors and arrays in a batch, or in a state, take; infinity where it cannot be told.

    Of a long sequence the first parts stand for the others.
    """
    if value is None or isinstance(value, bool | int | float):
        return 8
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    if isinstance(value, Mapping):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, Sequence) and len(value):
        measured = [bytes_of(part) for part in islice(value, _MOST_PARTS)]
        return sum(measured) * len(value) / len(measured)
    return 0 if isinstance(value, Sequence) else math.inf
