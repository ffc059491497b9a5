"""How one epoch's samples fall into global batches, and those onto ranks: arithmetic, nothing is read.

Contract: the sampler and whoever needs to know beforehand how many samples each rank has in a batch (the agreement of
ranks computes its ledger from `counts`) ask here. Global batch b covers the positions [b*G, (b+1)*G) of the epoch's
order. Where a rank's memory cannot hold its share of one, each is taken in `accumulate` iterations, micro-batches that
differ by at most one sample and follow each other; batches are numbered by iterations. Each rank takes a contiguous
part of a micro-batch; parts differ by at most one sample and the larger ones go to the low ranks, so a batch smaller
than the world leaves the high ranks without a sample in it. Only an epoch's last batch can be so small where each
micro-batch has a sample for every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EpochBatches:
    """The batches of an epoch of `length` samples over `world_size` ranks: `accumulate` to each `batch` samples.

    An epoch's last global batch may be smaller and is then taken in as few micro-batches as are needed for none to be
    larger than the others'. An epoch resumed where another batch size had stopped, at a place that is no multiple of
    this one, begins in the middle: `origin` samples are done and count as `origin_batch` batches, and batch
    `origin_batch` starts there.
    """

    length: int
    batch: int
    world_size: int
    drop_last: bool
    origin: int = 0
    accumulate: int = 1

    @property
    def micro(self) -> int:
        """Samples in the largest micro-batch."""
        return -(-self.batch // self.accumulate)

    @property
    def origin_batch(self) -> int:
        """Number of the first batch that is not done, when `origin` samples are: origin / batch, rounded up."""
        return -(-self.origin // self.batch) * self.accumulate

    @property
    def total(self) -> int:
        """Number of batches in the epoch, those before `origin` included."""
        whole, rest = divmod(self.length - self.origin, self.batch)
        return self.origin_batch + whole * self.accumulate + (0 if self.drop_last else -(-rest // self.micro))

    @property
    def end(self) -> int:
        """Position after the last sample that a batch covers: `length`, or less where the last batch is dropped."""
        return self.first(self.total)

    def first(self, number: int) -> int:
        """Position in the epoch's order of the first sample of batch `number`: the samples taken before it."""
        # `part` counts the micro-batches of one global batch.
        whole, part = divmod(number - self.origin_batch, self.accumulate)
        start = self.origin + whole * self.batch
        size = min(self.batch, self.length - start)
        # A last global batch that is smaller needs fewer micro-batches, none larger than the others'.
        parts = self.accumulate if size == self.batch else -(-size // self.micro)
        # Rounding down here spreads the remainder, so that micro-batches differ by at most one sample.
        taken = size * min(part, parts) // parts if parts > 0 else 0
        return min(self.length, max(0, start + taken))

    def firsts(self, start: int, stop: int) -> Positions:
        """`first` of the batches [start, stop), int64; after the epoch's end that of the batch after the last."""
        # The same arithmetic as `first`, over many numbers at once.
        whole, part = np.divmod(
            np.minimum(np.arange(start, stop, dtype=np.int64), self.total) - self.origin_batch, self.accumulate
        )
        begins = self.origin + whole * self.batch
        if self.accumulate > 1:
            sizes = np.clip(self.length - begins, 0, self.batch)
            parts = np.where(sizes == self.batch, self.accumulate, -(-sizes // self.micro))
            begins = begins + sizes * np.minimum(part, parts) // np.maximum(parts, 1)
        clipped: Positions = np.clip(begins, 0, self.length)
        return clipped

    def of_rank(self, rank: int) -> int:
        """Number of batches in which `rank` has a sample, those before `origin` included."""
        whole, rest = divmod(self.length - self.origin, self.batch)
        tail = 0 if self.drop_last else rest
        return (
            self.origin_batch
            + whole * _larger_than(rank, self.batch, self.accumulate)
            + _larger_than(rank, tail, -(-tail // self.micro))
        )

    def part(self, number: int, rank: int) -> tuple[int, int]:
        """Positions [start, stop) of the epoch's order that `rank` takes in batch `number`."""
        first = self.first(number)
        share, extra = divmod(self.first(number + 1) - first, self.world_size)
        # The low ranks take one sample more, so each low rank before this one shifts its start by one.
        start = first + rank * share + min(rank, extra)
        return start, start + share + (rank < extra)

    def parts(self, start: int, stop: int, rank: int) -> tuple[Positions, Positions]:
        """Where the parts of `rank` begin in the order, and their samples, in batches [start, stop): int64 each."""
        firsts = self.firsts(start, stop + 1)
        shares, extras = np.divmod(np.diff(firsts), self.world_size)
        return firsts[:-1] + rank * shares + np.minimum(rank, extras), shares + (rank < extras)

    def counts(self, start: int, stop: int) -> Positions:
        """Samples of each rank in batches [start, stop): int64, shape (stop - start, world_size).

        Batches from `total` on have zero samples at every rank.
        """
        shares, extras = np.divmod(np.diff(self.firsts(start, stop + 1)), self.world_size)
        ranks = np.arange(self.world_size, dtype=np.int64)
        counts: Positions = shares[:, None] + (ranks < extras[:, None])
        return counts


def micro_batches(batch: int, world_size: int, most: int) -> int:
    """The least number of micro-batches of `batch` samples in which no rank takes more than `most`."""
    return -(-batch // (most * world_size))


def _larger_than(samples: int, size: int, parts: int) -> int:
    """How many of `parts` even parts of `size` samples have more than `samples`."""
    if parts == 0:
        return 0
    share, extra = divmod(size, parts)
    return parts if share > samples else extra * (share + 1 > samples)
