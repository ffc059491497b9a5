"""How one epoch's samples fall into global batches, and those onto ranks: arithmetic, nothing is read.

Contract: the sampler and whoever needs to know beforehand how many samples each rank has in a batch (the agreement of
ranks computes its ledger from `counts`) ask here. Global batch b covers the positions [first(b), first(b + 1)) of the
epoch's order. Each rank takes a contiguous part of it; parts differ by at most one sample and the larger ones go to
the low ranks, so a batch smaller than the world leaves the high ranks without a sample in it. Only an epoch's last
batch can be so small, since a global batch has at least one sample a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class EpochBatches:
    """The global batches of an epoch of `length` samples, `batch` samples each, over `world_size` ranks.

    An epoch resumed where another batch size had stopped, at a place that is no multiple of this one, begins in the
    middle: `origin` samples are done and count as `origin_batch` batches, and batch `origin_batch` starts there.
    """

    length: int
    batch: int
    world_size: int
    drop_last: bool
    origin: int = 0

    @property
    def origin_batch(self) -> int:
        """Number of the first batch that is not done, when `origin` samples are: origin / batch, rounded up."""
        return -(-self.origin // self.batch)

    @property
    def total(self) -> int:
        """Number of global batches in the epoch, those before `origin` included."""
        left = self.length - self.origin
        return self.origin_batch + (left // self.batch if self.drop_last else -(-left // self.batch))

    @property
    def end(self) -> int:
        """Position after the last sample that a batch covers: `length`, or less where the last batch is dropped."""
        return min(self.length, self.first(self.total))

    def first(self, number: int) -> int:
        """Position in the epoch's order of the first sample of batch `number`: the samples taken before it."""
        return min(self.length, max(0, self.origin + (number - self.origin_batch) * self.batch))

    def of_rank(self, rank: int) -> int:
        """Number of batches in which `rank` has a sample; they are the first ones."""
        last = self.total - 1
        if last < self.origin_batch:
            return self.total
        return last + (self.first(last + 1) - self.first(last) > rank)

    def part(self, number: int, rank: int) -> tuple[int, int]:
        """Positions [start, stop) of the epoch's order that `rank` takes in batch `number`."""
        first = self.first(number)
        share, extra = divmod(self.first(number + 1) - first, self.world_size)
        start = first + rank * share + min(rank, extra)
        return start, start + share + (rank < extra)

    def counts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Samples of each rank in batches [start, stop): int64, shape (stop - start, world_size).

        Batches from `total` on have zero samples at every rank.
        """
        numbers = np.arange(start, stop + 1, dtype=np.int64)
        firsts = self.origin + (np.minimum(numbers, self.total) - self.origin_batch) * self.batch
        sizes = np.diff(np.clip(firsts, 0, self.length))
        shares, extras = np.divmod(sizes, self.world_size)
        ranks = np.arange(self.world_size, dtype=np.int64)
        counts: npt.NDArray[np.int64] = shares[:, None] + (ranks < extras[:, None])
        return counts
