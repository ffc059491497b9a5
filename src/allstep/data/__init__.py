"""Which rank reads which sample: the order of an epoch, its split over ranks, and the loader that reads it.

Everything here is told its rank and world size as arguments. The order is a function of (seed, epoch) and augmentation
of (seed, epoch, position), so neither depends on how many ranks or workers there are.

What does not live here: the current World (`world`), how ranks with different amounts of data agree (`engine`), and
where a run stands in its data when it is saved (`engine.position`).
"""

from __future__ import annotations

from allstep.data.batches import EpochBatches
from allstep.data.keys import epoch_key
from allstep.data.loader import Loader, make_loader
from allstep.data.permutation import Permutation
from allstep.data.sampler import IndexBatch, ShardedBatchSampler
from allstep.data.seeding import SampleSeeding
from allstep.data.stream_sharding import PlacedIterable, shard
from allstep.data.worker_signals import WorkerStart
from allstep.data.zipped import ZippedLoaders, zip_loaders

__all__ = [
    "EpochBatches",
    "IndexBatch",
    "Loader",
    "Permutation",
    "PlacedIterable",
    "SampleSeeding",
    "ShardedBatchSampler",
    "WorkerStart",
    "ZippedLoaders",
    "epoch_key",
    "make_loader",
    "shard",
    "zip_loaders",
]
