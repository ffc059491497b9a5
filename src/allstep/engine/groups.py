"""Gradient accumulation: the batches of one optimizer step, read together so that each has its exact weight.

Contract: with `Engine(..., accumulate=N)` the loop takes its batches from a `GroupFeed`, which reads a whole group
before it gives the group's first batch. For each it sets `state.weight` to the share of the group's samples that the
batch holds, so that the weighted sum of mean-reduced losses is the mean over all samples of the group, and
`state.group_end` on the last. A group never crosses an epoch's end, so an epoch's last group may be short; where the
data ends and is begun again inside an epoch, the group goes on. What can go wrong: a batch whose samples cannot be
counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from allstep.engine.source import END, Source
from allstep.engine.state import State
from allstep.errors import DataError

SamplesIn = Callable[[Any], int]


class GroupFeed:
    """Batches of `source` in groups of `size`. `limit` is the iteration at which the epoch ends, once known.

    When `source` is replaced, the group that was begun is finished first.
    """

    def __init__(self, source: Source, size: int, samples_in: SamplesIn, state: State) -> None:
        self.source = source
        self._size = size
        self._samples_in = samples_in
        self._state = state
        self._read: list[Any] = []
        self._ready: deque[tuple[Any, float, bool]] = deque()
        self.limit: float = float("inf")

    @property
    def pending(self) -> int:
        """Batches that were read and not yet given."""
        return len(self._read) + len(self._ready)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._ready:
            self._read_group()
        batch, self._state.weight, self._state.group_end = self._ready.popleft()
        return batch

    def close_group(self) -> None:
        """End the group being read: no more batches are coming."""
        try:
            counts = [self._samples_in(batch) for batch in self._read]
        except StopIteration as error:  # would be taken for the end of data
            raise DataError("samples_in raised StopIteration; it must return the samples in a batch") from error
        total = sum(counts)
        last = len(counts) - 1
        for at, (batch, count) in enumerate(zip(self._read, counts, strict=True)):
            self._ready.append((batch, count / total if total else 0.0, at == last))
        self._read.clear()

    def clear(self) -> None:
        """Drop what was read: the epoch was cut short."""
        self._read.clear()
        self._ready.clear()

    def _read_group(self) -> None:
        assert self.source.batches is not None
        while len(self._read) < min(self._size, self.limit - self._state.iteration):
            batch = next(self.source.batches, END)
            if batch is END:
                raise StopIteration
            self._read.append(batch)
        self.close_group()


def count_samples(batch: Any) -> int:
    """Samples in a batch: the size of the first dimension of its first tensor, found depth first.

    Raises:
        DataError: the batch holds nothing with a first dimension.
    """
    found = _first_dimension(batch)
    if found is None:
        raise DataError(
            f"cannot count the samples of a batch of type {type(batch).__name__}: it holds no tensor; give "
            "Engine(..., samples_in=function of the batch)"
        )
    return found


def _first_dimension(value: Any) -> int | None:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    parts: Sequence[Any] | None = None
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = value
    for part in parts or ():
        found = _first_dimension(part)
        if found is not None:
            return found
    return None
