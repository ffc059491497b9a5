"""Which samples each rank takes, batch by batch: the order of an epoch is a function of (seed, epoch) and nothing else.

Contract. A DataLoader asks for an iterator per epoch; the engine, or whoever trains, calls `set_epoch` before each and,
to go on inside an epoch, `skip_batches` or `load_state_dict`. Global batch b is order[b*G:(b+1)*G], of which every rank
takes a contiguous part (see `EpochBatches`); no sample is repeated or padded, and any world size with the same G trains
the same global batches. An iterator keeps what it was made with: `set_epoch` while one is in use does not disturb it.

Micro-batches. With `max_batch_per_rank` a global batch that is too large for a rank's memory is taken in `accumulate`
iterations, whose gradients are to be added up; batches are then those iterations, and every promise above holds for the
global batches, which do not depend on it.

Position. A sampler cannot see what was trained: a DataLoader asks it for batches far ahead of the step. So `state_dict`
is told how many batches of the epoch are done, and nothing here counts by itself. The state holds samples taken by the
whole world, so it loads at any world size and any batch size. Batches are numbered from the epoch's beginning, also
after a resume: the next iteration begins at batch `next_batch`, and only that one; the one after begins at batch 0, and
`set_epoch` of another epoch forgets the position. An iteration takes the position when its first batch is asked for,
because a DataLoader with workers makes two iterators and uses the second.

What can go wrong: in an epoch's last batch, when it has fewer samples than the world has ranks, the high ranks have
none. Such a rank yields one batch fewer; `len(sampler)` is the epoch's number of batches, the same on every rank, and
`counts` says who has how many. A dataset may be longer in another epoch: its length is read where an epoch begins.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from allstep.data.batches import EpochBatches, micro_batches
from allstep.data.keys import epoch_key
from allstep.data.permutation import MAX_LENGTH, Permutation
from allstep.data.sampler_order import SamplerOrder
from allstep.errors import DataError

_Order = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
_ORDER_VERSION = 1  # of saved states; another is refused, since its order would be another
_FIRST_CHUNK = 1 << 10  # samples that are looked up in the order at once, at first
_LARGEST_CHUNK = 1 << 16


class IndexBatch(list[int]):
    """Dataset indices of one rank's part of a batch, which also say where in which epoch they stand.

    `position` is the place of the first index in the order of epoch `epoch`; the others follow it.
    """

    __slots__ = ("epoch", "position")

    def __init__(self, indices: list[int], epoch: int, position: int) -> None:
        super().__init__(indices)
        self.epoch = epoch
        self.position = position

    def __reduce__(self) -> tuple[type[IndexBatch], tuple[list[int], int, int]]:
        return IndexBatch, (list(self), self.epoch, self.position)


@dataclass(frozen=True, slots=True, eq=False)
class _Position:
    batches: EpochBatches
    next_batch: int = 0


class ShardedBatchSampler(Sampler[list[int]]):
    """Batch sampler for one rank of a world; yields lists of dataset indices.

    Args:
        data: a dataset with a length, or its length in samples.
        batch_size: samples a rank takes in a batch; the global batch is this times `world_size`.
        global_batch_size: samples all ranks together take in a batch; give this or `batch_size`. At least one a rank;
            what does not divide evenly goes to the low ranks.
        rank: this rank, from 0.
        world_size: the number of ranks.
        max_batch_per_rank: the most samples that a rank takes in a batch; a larger share of a global batch is taken in
            `accumulate` batches, the same number on every rank.
        shuffle: a random order each epoch, else the dataset's own.
        sampler: indices in the order that is dealt out, in place of either; see `SamplerOrder`.
        drop_last: leave out a last global batch that is smaller than the others.
        seed: any integer, the same on every rank.

    Raises DataError for arguments that cannot work together.
    """

    def __init__(
        self,
        data: Sized | int,
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        max_batch_per_rank: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise DataError(f"rank is {rank} and world_size {world_size}; ranks count from 0 to world_size - 1")
        if not isinstance(seed, (int, np.integer)):
            raise DataError(f"seed is {seed!r}; give an integer, the same on every rank")
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = int(seed)
        self.sampler_order = None if sampler is None else SamplerOrder(sampler, self.seed)
        self._data = data if self.sampler_order is None else self.sampler_order
        self.length = _length_of(self._data)
        self.global_batch_size = resolve_global_batch(batch_size, global_batch_size, world_size)
        self.accumulate = _resolve_accumulate(self.global_batch_size, world_size, max_batch_per_rank)
        self._epoch = 0
        self._position = _Position(self._epoch_batches())
        self._read_to_end = self._warned = False  # since the epoch was set

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration belongs to."""
        return self._epoch

    @property
    def next_batch(self) -> int:
        """Number of the batch that the next iteration begins with."""
        return self._position.next_batch

    @property
    def global_length(self) -> int:
        """Number of the world's batches in the epoch: `accumulate` to each global batch."""
        return self._position.batches.total

    @property
    def batches_in_epoch(self) -> int:
        """Number of the world's batches in an epoch that is not resumed inside."""
        return self._epoch_batches().total

    @property
    def batches_of_rank(self) -> int:
        """Number of the batches in which this rank has a sample: one fewer than `len`, or as many."""
        return self._position.batches.of_rank(self.rank)

    @property
    def present_batches(self) -> EpochBatches:
        """The batches of the pass that was begun last; they do not change when another pass begins."""
        return self._position.batches

    def __len__(self) -> int:
        return self.global_length

    def counts(self, start: int, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Samples that each rank has in batch `start`, int64 of shape (world_size,), by arithmetic.

        With `stop`: of the batches [start, stop), shape (stop - start, world_size). Batches after the epoch's end have
        zero samples at every rank. Raises DataError for a negative start or a stop before it.
        """
        if start < 0 or (stop is not None and stop < start):
            raise DataError(f"counts({start}, {stop}): batches are numbered from 0, and stop must not be before start")
        if stop is None:
            row: npt.NDArray[np.int64] = self._position.batches.counts(start, start + 1)[0]
            return row
        return self._position.batches.counts(start, stop)

    def indices(self, number: int) -> npt.NDArray[np.int64]:
        """Dataset indices of this rank's part in batch `number` of the epoch, int64, by arithmetic."""
        positions = np.arange(*self._position.batches.part(number, self.rank), dtype=np.int64)
        order = self._order()
        return positions if order is None else order(positions)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch (counted from 0). Another epoch than before begins at its first batch."""
        self._read_to_end = False
        if epoch != self._epoch:
            self._epoch = epoch
            self._begin_anew()

    def dealing(self) -> dict[str, Any]:
        """What has to be the same on every rank for each sample to come to one of them."""
        order = self.sampler_order
        drawn = {} if order is None else {"what the sampler draws": zlib.crc32(order.of(self._epoch).tobytes())}
        return {
            "the dataset's length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "global_batch_size": self.global_batch_size,
            "accumulate": self.accumulate,
            "drop_last": self.drop_last,
            "world_size": self.world_size,
            **drawn,
        }

    def warn_of_same_order(self) -> None:
        """Warn once where a pass begins in the shuffled order that another was read to its end in."""
        if self.shuffle and self._read_to_end and not self._warned:
            self._warned = True
            warnings.warn(
                f"a loader with shuffle=True is read again in the order of epoch {self._epoch + 1}: call "
                "loader.set_epoch(epoch) before each pass, as an Engine does for a loader that it is given or can find "
                "in its data",
                stacklevel=3,
            )

    def skip_batches(self, count: int) -> None:
        """The next iteration, and only that, begins at batch `count` of the epoch, whatever position was set before.

        Raises DataError when the epoch has fewer batches, or when `count` lies before the place where a loaded state
        resumed the epoch with another batch size.
        """
        first = self._position.batches.origin_batch
        if not first <= count <= self.global_length:
            raise DataError(
                f"skip_batches({count}): epoch {self._epoch + 1} has batches {first} to {self.global_length} "
                f"of {self.global_batch_size} samples; give a number in that range"
            )
        self._position = _Position(self._position.batches, count)

    def state_dict(self, batches_done: int, epoch: int | None = None) -> dict[str, Any]:
        """The state that resumes an epoch after `batches_done` of its batches, counted from the epoch's beginning.

        `batches_done` is what steps consumed, which may be less than what a DataLoader has read; `epoch` is by default
        the one that the next iteration belongs to. The dictionary holds plain numbers and is the same on every rank.
        Raises DataError when the epoch has fewer batches.
        """
        if not 0 <= batches_done <= self.global_length:
            raise DataError(
                f"state_dict({batches_done}): epoch {self._epoch + 1} has {self.global_length} batches; "
                "give the number of its batches that steps consumed"
            )
        return {
            **self._order_state(),
            "epoch": self._epoch if epoch is None else epoch,
            "samples_taken": self._position.batches.first(batches_done),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, at any world size and batch size; the next iteration begins there.

        Raises DataError, and changes nothing, when the state is of another dataset length, order or seed.
        """
        self.length = _length_of(self._data)
        mine = self._order_state()
        # Where none of an epoch's samples is taken, any number of them may follow: the dataset may have grown.
        if state.get("samples_taken") == 0:
            del mine["length"]
        missing = sorted((mine.keys() | {"epoch", "samples_taken"}) - state.keys())
        if missing:
            raise DataError(f"the sampler state lacks {', '.join(missing)}; load what state_dict() of a sampler gave")
        for name, value in mine.items():
            if state[name] != value:
                raise DataError(
                    f"the sampler state has {name}={state[name]!r} and this sampler {name}={value!r}; "
                    "the saved place is only valid in the same order of the same dataset"
                )
        taken = state["samples_taken"]
        if not 0 <= taken <= self.length:
            raise DataError(f"the sampler state has samples_taken={taken}, outside the dataset's 0 to {self.length}")
        self._epoch = state["epoch"]
        plain = taken % self.global_batch_size == 0 or taken == self.length
        batches = self._epoch_batches(origin=0 if plain else taken)
        self._position = _Position(batches, min(-(-taken // self.global_batch_size) * self.accumulate, batches.total))

    def __iter__(self) -> Iterator[list[int]]:
        if self._position.next_batch == 0:
            self._begin_anew()
        return self._begin(self._position, self._order(), self._epoch)

    def leave_position(self) -> None:
        """The iteration that was begun has taken the position, so that another one begins at batch 0."""
        self._position = _Position(self._position.batches)

    def _begin(self, position: _Position, order: _Order | None, epoch: int) -> Iterator[list[int]]:
        if self._position is position:
            self.leave_position()
        yield from _index_batches(position.batches, self.rank, position.next_batch, order, epoch)
        self._read_to_end = self._read_to_end or epoch == self._epoch

    def _begin_anew(self) -> None:
        self.length = _length_of(self._data)
        self._position = _Position(self._epoch_batches())

    def _order(self) -> _Order | None:
        """The present epoch's order, from positions to dataset indices; None for the dataset's own."""
        if self.sampler_order is not None:
            return self.sampler_order.of(self._epoch).__getitem__
        return Permutation(self.length, epoch_key(self.seed, self._epoch)) if self.shuffle else None

    def _order_state(self) -> dict[str, Any]:
        """What a saved place is valid for."""
        state = {"version": _ORDER_VERSION, "length": self.length, "shuffle": self.shuffle, "seed": self.seed}
        return state if self.sampler_order is None else {**state, "sampler": type(self.sampler_order.sampler).__name__}

    def _epoch_batches(self, origin: int = 0) -> EpochBatches:
        sizes = self.length, self.global_batch_size, self.world_size
        return EpochBatches(*sizes, self.drop_last, origin, self.accumulate)


def resolve_global_batch(batch_size: int | None, global_batch_size: int | None, world_size: int) -> int:
    """The global batch that one of the two sizes, in samples, means. Raises DataError for none, both or too small."""
    if (batch_size is None) == (global_batch_size is None):
        raise DataError(
            f"batch_size is {batch_size} and global_batch_size {global_batch_size}; give one of them: "
            "samples a rank, or samples of all ranks together"
        )
    for name, value in (("batch_size", batch_size), ("global_batch_size", global_batch_size)):
        if value is not None and not isinstance(value, int | np.integer):
            raise DataError(f"{name} is {value!r}; give an int")
    if batch_size is not None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; give at least 1")
        return batch_size * world_size
    assert global_batch_size is not None
    if global_batch_size < world_size:
        raise DataError(
            f"global_batch_size is {global_batch_size} for {world_size} ranks; give at least one sample a rank, "
            f"{world_size} or more"
        )
    return global_batch_size


def _resolve_accumulate(global_batch: int, world_size: int, most: int | None) -> int:
    if most is None:
        return 1
    if not isinstance(most, int | np.integer) or most < 1:
        raise DataError(f"max_batch_per_rank is {most!r}; give an int of at least 1, or leave it out")
    return micro_batches(global_batch, world_size, int(most))


def _length_of(data: Sized | int) -> int:
    try:
        length = int(data) if isinstance(data, int | np.integer) else len(data)
    except TypeError as error:
        raise DataError(
            f"{type(data).__name__} has no length; a sampler needs a map-style dataset with __len__, "
            "or the number of samples itself"
        ) from error
    if not 0 <= length <= MAX_LENGTH:
        raise DataError(f"the dataset's length is {length}; it must lie between 0 and 2**62")
    return length


def _index_batches(
    batches: EpochBatches, rank: int, start: int, order: _Order | None, epoch: int
) -> Iterator[list[int]]:
    # A run of batches is looked up in the order at once; the run grows, so that the first batch comes at once.
    number, stop = start, batches.total
    run = _FIRST_CHUNK
    while number < stop:
        many = max(1, min(run * batches.world_size // batches.micro, stop - number))
        begins, sizes = batches.parts(number, number + many, rank)
        ends = np.cumsum(sizes)
        positions = np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(begins - (ends - sizes), sizes)
        indices = (positions if order is None else order(positions)).tolist()
        done = 0
        for first, end in zip(begins.tolist(), ends.tolist(), strict=True):
            if end > done:
                yield IndexBatch(indices[done:end], epoch, first)
            done = end
        number += many
        run = min(2 * run, _LARGEST_CHUNK)
