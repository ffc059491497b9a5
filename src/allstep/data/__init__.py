"""Who reads which sample: the order of an epoch, its split over ranks, and the loader that reads it.

Contract: everything here is told its rank and world size and asks nobody. The order is a function of (seed, epoch),
augmentation of (seed, epoch, position), so neither depends on how many ranks or workers there are.
"""

from __future__ import annotations

from allstep.data.batches import EpochBatches
from allstep.data.keys import epoch_key
from allstep.data.loader import Loader, make_loader
from allstep.data.permutation import Permutation
from allstep.data.sampler import IndexBatch, ShardedBatchSampler
from allstep.data.seeding import SampleSeeding
from allstep.data.sharding import PlacedIterable, shard
from allstep.data.worker_signals import WorkerStart

__all__ = [
    "EpochBatches",
    "IndexBatch",
    "Loader",
    "Permutation",
    "PlacedIterable",
    "SampleSeeding",
    "ShardedBatchSampler",
    "WorkerStart",
    "epoch_key",
    "make_loader",
    "shard",
]
