"""A DataLoader for one rank of a world: same batches, same augmentation, whatever the number of ranks and workers.

Contract: `World.loader` (or anyone who knows a rank) calls `make_loader`; what comes back is a torch DataLoader. The
engine calls `set_epoch` before each epoch and `skip_batches` to go on inside one. Iterating draws nothing from the
global generators: worker seeds come from a generator of the loader's own, seeded anew from (seed, epoch, rank) for each
iteration. What an iterator yields is settled when it is made; a later `set_epoch` concerns the next. So passes that
overlap do not disturb each other, whatever the workers. As torch's does by default, each pass has new workers, which
see the dataset as it is then. Where batches are placed on a device (`place`, for XLA), the one after the present is on
its way there while a step works on that.

Map-style datasets go through a `ShardedBatchSampler` (`loader.batch_sampler`) and, unless seeding is off, a
`SeededDataset`; iterable datasets through a `PlacedIterable`, in which `shard` knows the rank. Both read as the dataset
they wrap, which is `loader.source`. Arguments that contradict this raise a DataError.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, IterDataPipe
from torch.utils.data import default_collate as torch_collate

from allstep.cuda import has_pinned_memory
from allstep.data.compositions import draws_each_pass
from allstep.data.epochs import wants_epoch
from allstep.data.keys import key_of
from allstep.data.sampler import ShardedBatchSampler, resolve_global_batch
from allstep.data.seeding import SampleSeeding, SeededDataset, draws_nothing, fetches_batches, keep_collated
from allstep.data.stream_sharding import PlacedIterable
from allstep.data.torch_private import child_processes, workers_of
from allstep.data.worker_passes import begin_pass
from allstep.data.worker_signals import WorkerStart, end_with_rank
from allstep.errors import ArgumentTypeError, DataError
from allstep.suggestions import unknown_option

log = logging.getLogger("allstep.data")

_WORKERS = 3  # sets the seeds of workers apart from other keys of the same seed and epoch
_SEEDINGS = ("sample", "batch", "off")
_DATALOADER_OPTIONS = frozenset(inspect.signature(DataLoader.__init__).parameters) - {"self", "dataset"}
_OWN_OPTIONS = (
    *("global_batch_size", "max_batch_per_rank", "shuffle", "sampler", "drop_last", "sample_seeding", "seed"),
)


class Loader(DataLoader[Any]):
    """What `make_loader` makes: a DataLoader that knows its epoch and its place in it.

    `len(loader)` is the epoch's number of batches, the same on every rank; where an epoch's last batch has fewer
    samples than there are ranks, the high ranks have none in it and give one batch fewer. `source` is the dataset as it
    was given.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        source: Dataset[Any],
        seed: int,
        rank: int,
        place: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.source = source
        self._place = place
        self.seed = seed
        self.rank = rank
        self._own_generator = options.get("generator") is None
        # torch draws the workers' seeds from this; without it, it would draw from the global generator.
        if self._own_generator:
            options["generator"] = torch.Generator()
        self._stream_epoch = 0
        self._drop_first = 0
        super().__init__(dataset, **options)

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration belongs to."""
        return self._stream_epoch if self.sharded_sampler is None else self.sharded_sampler.epoch

    @property
    def sharded_sampler(self) -> ShardedBatchSampler | None:
        """The batch sampler, or None over an iterable dataset."""
        sampler = self.batch_sampler
        return sampler if isinstance(sampler, ShardedBatchSampler) else None

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """What makes a batch of samples, wherever that happens."""
        # Kept by the dataset where that is seeded, since collation goes on from its seeds.
        return self.dataset.collate if isinstance(self.dataset, SeededDataset) else self.collate_fn

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch (counted from 0). Another epoch than before begins at its first batch."""
        if self.sharded_sampler is not None:
            if isinstance(self.dataset, SeededDataset):
                self.dataset.tell_epoch(epoch)  # before the sampler asks for its length
            self.sharded_sampler.set_epoch(epoch)
            return
        if epoch != self._stream_epoch:
            self._stream_epoch = epoch
            self._drop_first = 0
        if isinstance(self.dataset, PlacedIterable):
            self.dataset.set_epoch(epoch)

    def skip_batches(self, count: int) -> None:
        """The next iteration, and only that, begins at this rank's batch `count` of the epoch.

        At once over a map-style dataset; over an iterable one the batches before it are read and dropped. Raises
        DataError when the epoch is known to have fewer batches.
        """
        if self.sharded_sampler is not None:
            self.sharded_sampler.skip_batches(count)
        elif count < 0:
            raise DataError(f"skip_batches({count}): give 0 or more")
        else:
            if count:
                warn_of_dropping(count, self.source)
            self._drop_first = count

    def state_dict(self, batches_done: int, epoch: int | None = None) -> dict[str, Any]:
        """The state that resumes this epoch after `batches_done` of its batches; see `ShardedBatchSampler.state_dict`.

        Raises DataError over an iterable dataset, whose place only the dataset itself can save.
        """
        return self._positioned().state_dict(batches_done, epoch)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, at any world size, batch size and number of workers."""
        self._positioned().load_state_dict(state)

    def __iter__(self) -> Any:
        if self._own_generator:
            # Seeded by place, so that a resumed epoch gives its workers the seeds that they had.
            self.generator.manual_seed(key_of(self.seed, self.epoch, _WORKERS, self.rank) >> 1)
        if self.sharded_sampler is not None:
            self.sharded_sampler.warn_of_same_order()
        iterator = begin_pass(self, Loader._iterate)
        if self.sharded_sampler is not None:
            self.sharded_sampler.leave_position()
        dropped, self._drop_first = self._drop_first, 0
        # `self` stands for the end: no batch is the loader.
        for _ in range(dropped):
            if next(iterator, self) is self:
                break
        # An iterable dataset may save its own place, ahead of which nothing may be read.
        return iterator if self._place is None or self.sharded_sampler is None else PlacedAhead(iterator, self._place)

    def _iterate(self) -> Any:
        """What torch makes of the loader; its workers end with this process at the latest."""
        before = child_processes()
        iterator = super().__iter__()
        end_with_rank(workers_of(iterator, self.num_workers, before))
        return iterator

    def _positioned(self) -> ShardedBatchSampler:
        sampler = self.sharded_sampler
        if sampler is None:
            raise DataError(
                f"{type(self.source).__name__} is an iterable dataset: a loader cannot save a place in it; "
                "save the dataset's own state, or skip_batches(n) to read and drop"
            )
        return sampler


class PlacedAhead(Iterator[Any]):
    """A pass whose next batch is on its way to the device while a step works on the present one.

    It reads in the thread that asks for batches: datasets may draw from generators that a step draws from as well.

    Args:
        batches: of the pass, on the host.
        place: begins to move a batch to the device, and does not wait for it.
    """

    def __init__(self, batches: Iterator[Any], place: Callable[[Any], Any]) -> None:
        self._batches = batches
        self._place = place
        self._ahead: tuple[Any, Exception | None] | None = None

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        batch, error = self._ahead or self._read()
        if error is not None:
            self._ahead = batch, error
            raise error
        self._ahead = self._read()
        return batch

    def _read(self) -> tuple[Any, Exception | None]:
        try:
            return self._place(next(self._batches)), None
        except Exception as error:  # the end, or the dataset's own, which comes when the batch before it was given
            return None, error


def warn_of_dropping(batches: int, data: Any) -> None:
    """Say that a run goes on inside an epoch by reading `batches` batches and dropping them, and what that loses."""
    drawn = draws_each_pass(data)
    lost = f" Its {drawn} draws another order now: samples of this epoch may come twice, or never." if drawn else ""
    warnings.warn(
        f"{batches} batches of {type(data).__name__} are read and dropped to get to where the run goes on.{lost} To go "
        "on at once and exactly, give a map-style dataset to world.loader, or data with state_dict() and "
        "load_state_dict()",
        stacklevel=2,
    )


def make_loader(
    dataset: Dataset[Any],
    *,
    rank: int,
    world_size: int,
    seed: int,
    batch_size: int | None = None,
    global_batch_size: int | None = None,
    max_batch_per_rank: int | None = None,
    shuffle: bool = False,
    sampler: Iterable[int] | None = None,
    drop_last: bool = False,
    sample_seeding: SampleSeeding | None = None,
    device_type: str = "cpu",
    place: Callable[[Any], Any] | None = None,
    **dataloader_options: Any,
) -> Loader:
    """The loader of one rank.

    Args:
        dataset: map-style (`__len__`, and `__getitem__` or `__getitems__`) or a torch IterableDataset.
        rank: this rank, from 0.
        world_size: the number of ranks.
        seed: any integer, the same on every rank; it decides order and augmentation.
        batch_size: samples a rank takes in a batch.
        global_batch_size: samples all ranks take in a batch; give this or `batch_size`. An iterable dataset takes
            either, or neither when its elements are batches already; there it must be divisible by `world_size`.
        max_batch_per_rank: the most samples that a rank takes in one iteration. A global batch of which a rank's share
            is larger is taken in several iterations; an engine adds up their gradients. Map-style datasets only.
        shuffle: see `ShardedBatchSampler`.
        sampler: indices in the order that they are dealt in, such as a torch `WeightedRandomSampler`; in place of
            `shuffle`, and with a length. What it draws depends on `seed` and the epoch, not on the rank.
        drop_last: see `ShardedBatchSampler`.
        sample_seeding: seed random augmentation for each "sample" (the same at any world size and number of workers),
            once for each rank's "batch" (the same at any number of workers), or not at all ("off"). By default
            "off" where nothing can draw, as over tensors with torch's collation, "batch" where the dataset gives whole
            batches (`__getitems__`, as Hugging Face's do), for which one sample costs nearly as much as many, and
            "sample" elsewhere. An iterable dataset is never seeded.
        device_type: where batches go, such as "cuda"; decides whether memory is pinned by default.
        place: moves a batch to the device without waiting, for batches of a map-style dataset to be there when they are
            given. None gives them on the host.
        dataloader_options: passed on to torch's DataLoader, whose defaults hold but for `pin_memory` (True for cuda,
            xpu and what else has pinned memory), and `generator` (the loader's own). Workers ignore SIGTERM and
            SIGUSR1, which are for the ranks; a `worker_init_fn` is called after that is settled. With
            `multiprocessing_context="forkserver"` workers are not forked from the rank, whose CUDA and NCCL have
            threads and memory that a fork copies only half.

    Raises DataError for arguments that cannot work together, and ArgumentTypeError for an unknown one.
    """
    if sample_seeding is not None and sample_seeding not in _SEEDINGS:
        raise DataError(f"sample_seeding is {sample_seeding!r}; it must be one of {', '.join(_SEEDINGS)}")
    if unknown := unknown_option("loader", dataloader_options, _OWN_OPTIONS, _DATALOADER_OPTIONS, "torch's DataLoader"):
        raise ArgumentTypeError(unknown)
    if dataloader_options.pop("batch_sampler", None) is not None:
        raise DataError(
            "batch_sampler was given, but the loader brings its own, which deals samples to ranks; choose the order "
            "with sampler and the size with batch_size. A plain DataLoader takes your batch_sampler, which then has to "
            "give each rank other batches"
        )
    if sampler is not None and shuffle:
        raise DataError("shuffle=True and a sampler were given, and each decides the order; give one of them")
    has_workers = dataloader_options.get("num_workers", 0) > 0
    options = {"pin_memory": has_pinned_memory(device_type), "place": place, **dataloader_options}
    if has_workers:
        options["worker_init_fn"] = WorkerStart(options.get("worker_init_fn"))
    if isinstance(dataset, IterableDataset):
        if shuffle:
            raise DataError(
                "shuffle=True over an iterable dataset, whose order only the dataset decides; shuffle there"
            )
        if sampler is not None:
            raise DataError("a sampler was given for an iterable dataset, whose order only the dataset decides")
        if max_batch_per_rank is not None:
            raise DataError(
                "max_batch_per_rank was given for an iterable dataset, whose batches are not dealt from a global one; "
                "give batch_size, and accumulate= to the Engine"
            )
        options["batch_size"] = _iterable_batch(batch_size, global_batch_size, world_size)
        options["drop_last"] = drop_last
        # Data pipes shard and seed themselves through hooks that torch finds by their type.
        placed = dataset if isinstance(dataset, IterDataPipe) else PlacedIterable(dataset, rank, world_size)
        return Loader(placed, source=dataset, seed=seed, rank=rank, **options)
    # Which batch comes next must be a function of the place, or no run could go on inside an epoch.
    if options.get("in_order") is False:
        raise DataError("in_order=False gives batches in another order on each run; leave it out over a map dataset")
    options["batch_sampler"] = ShardedBatchSampler(
        dataset,  # type: ignore[arg-type]
        batch_size=batch_size,
        global_batch_size=global_batch_size,
        max_batch_per_rank=max_batch_per_rank,
        rank=rank,
        world_size=world_size,
        shuffle=shuffle,
        sampler=sampler,
        drop_last=drop_last,
        seed=seed,
    )
    collate = options.get("collate_fn") or torch_collate
    if sample_seeding is None and collate is torch_collate and draws_nothing(dataset):
        sample_seeding = "off"
    if sample_seeding == "off" and not wants_epoch(dataset):
        return Loader(dataset, source=dataset, seed=seed, rank=rank, **options)
    if sample_seeding is None:
        sample_seeding = "batch" if fetches_batches(dataset) else "sample"
        if sample_seeding == "batch" and rank == 0:
            log.info(
                "%s gives whole batches, so random augmentation is seeded by batch: it depends on the number of ranks. "
                'sample_seeding="sample" makes it the same at any, and fetches samples one by one',
                type(dataset).__name__,
            )
    seeded = SeededDataset(dataset, collate, seed=seed, seeding=sample_seeding)
    # Collation happens in the dataset, after its seeding; DataLoader must not do it again.
    options["collate_fn"] = keep_collated
    return Loader(seeded, source=dataset, seed=seed, rank=rank, **options)


def _iterable_batch(batch_size: int | None, global_batch_size: int | None, world_size: int) -> int | None:
    if batch_size is None and global_batch_size is None:
        return None
    total = resolve_global_batch(batch_size, global_batch_size, world_size)
    if total % world_size:
        raise DataError(
            f"global_batch_size is {total} for {world_size} ranks; over an iterable dataset, which is not dealt "
            f"sample by sample, it must be a multiple of {world_size}: give {total - total % world_size} or batch_size"
        )
    return total // world_size
