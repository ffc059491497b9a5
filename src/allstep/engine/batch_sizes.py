"""How many samples and bytes batches have: by arithmetic where that is known beforehand, else by looking at them.

Contract: ranks that agree have to say how many samples their coming batches hold. `declared_counts` knows that without
reading for data whose batches are arithmetic. `count_samples` looks at a batch that was read, unless the user gave a
`samples_in`. `bytes_of` tells how much memory a batch keeps while it is held. All of them are pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

Counts = Callable[[int, int], list[int | None]]
"""`(start, stop) -> samples in the batches from start to stop`; None where there is no batch."""


def declared_counts(data: Any) -> tuple[Counts, int | None] | None:
    """Counts of a pass over `data` by arithmetic, and its batches; None when it has to be read to be counted."""
    if data is None:  # an endless series of None, each of which counts as one sample
        return lambda start, stop: [1] * (stop - start), None
    sampler = getattr(data, "batch_sampler", None)
    counts_of = getattr(sampler, "counts", None)
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


def count_samples(batch: Any) -> int:
    """Samples in a batch: the size of the first dimension of its first tensor, found depth first; without any, 1."""
    found = _first_dimension(batch)
    return 1 if found is None else found


def _first_dimension(value: Any) -> int | None:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = value
    for part in parts:
        found = _first_dimension(part)
        if found is not None:
            return found
    return None


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
