"""Where in its data a run stands, saved and taken up again: by arithmetic, by the data's own state, or by counting.

Contract: `resume` asks for `position_to_save` when a run is saved, and for `restore_position` before a run that goes on
from a loaded state has agreed on or begun anything. Data that is dealt by a `ShardedBatchSampler` has a position,
(seed, epoch, samples taken). It is the same on every rank and good at any world size and any split into micro-batches:
the run's counters, which count iterations, are translated to it. Data with `state_dict` and `load_state_dict` (a loader
of torchdata, or an iterable dataset that a DataLoader without workers reads) has a state of its own on each rank. Of
all other data only the number of batches is known.

A state is of what steps have consumed. Batches that were read ahead are not: `PositionHistory` keeps the data's states
behind each batch until the batch is done. The copies are taken after every batch and hardly ever read, so `copied` is
several times as fast as `copy.deepcopy` for what states are made of: containers, numbers, the tuples of random
generators, tensors and arrays. Like it, it shares nothing that can change; of a view it copies its own elements only,
and two places that hold one object hold two copies. A state that holds itself is a RecursionError: a checkpoint could
not keep it either.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from allstep.data import Loader, PlacedIterable, ShardedBatchSampler
from allstep.engine.batch_sizes import bytes_of
from allstep.engine.source import END
from allstep.errors import DataError


@dataclass(frozen=True, slots=True)
class RunPosition:
    """Where a saved run stood, and what it had been asked to do."""

    iteration: int
    epochs_completed: int
    epoch_began_at: int
    epoch_length: int | None
    max_epochs: int | None
    max_iters: int | None
    passes_began_at: int = 0
    inner_iterations: int = 0


@dataclass(frozen=True, slots=True)
class RestoredPosition:
    """What `restore_position` came to.

    Attributes:
        position: where the run stands, in iterations of this data.
        opens_at: number of the batch with which the first pass opens, which the data knows already; None where the
            pass has to be brought there by counting.
    """

    position: RunPosition
    opens_at: int | None


def sampler_of(data: Any) -> ShardedBatchSampler | None:
    """The sampler that deals `data` to ranks, if one does."""
    sampler = getattr(data, "batch_sampler", None)
    return sampler if isinstance(sampler, ShardedBatchSampler) else None


def stateful_of(data: Any) -> Any:
    """The object whose `state_dict` tells where in `data` its reader stands, or None."""
    # A loader of ours has a position by arithmetic: the same on all ranks, and good for any number of them.
    if not isinstance(data, Loader) and _has_state(data):
        return data
    # With workers it is a copy in another process that is read, whose state nobody here sees.
    if not isinstance(data, DataLoader) or not isinstance(data.dataset, IterableDataset) or data.num_workers:
        return None
    dataset = data.dataset.source if isinstance(data.dataset, PlacedIterable) else data.dataset
    return dataset if _has_state(dataset) else None


def group_size_over(data: Any, accumulate: int) -> int:
    """Iterations in an accumulation group of an engine that accumulates over `accumulate` global batches of `data`."""
    sampler = sampler_of(data)
    return accumulate * (1 if sampler is None else sampler.accumulate)


def position_to_save(data: Any, epoch: int, done: int, own: Any, group_size: int) -> dict[str, Any] | None:
    """What to save of the position in `data` after `done` batches of the pass of `epoch` (from 0), or None.

    `own` is the data's own state behind that batch, END where it has none.
    """
    sampler = sampler_of(data)
    if sampler is not None:
        longer = sampler.global_length - sampler.batches_in_epoch  # where another batch size stopped inside the epoch
        return {
            "position": sampler.state_dict(min(done + longer if done else 0, sampler.global_length), epoch),
            "batches": sampler.batches_in_epoch,
            "group_size": group_size,
        }
    return None if own is END else {"own": own}


def is_same_data(data: Any, saved: Mapping[str, Any]) -> bool:
    """Whether `data` takes up a saved position: it deals the same samples in the same order, or has states as well."""
    if "own" in saved:
        return stateful_of(data) is not None
    sampler = sampler_of(data)
    if sampler is None:
        return False
    present = sampler.state_dict(0, 0)
    return all(present[key] == saved["position"][key] for key in present if key not in ("epoch", "samples_taken"))


def restore_position(
    data: Any, saved: Mapping[str, Any] | None, position: RunPosition, group_size: int
) -> RestoredPosition:
    """Bring `data` to a saved position, and the counters of the run to this data.

    Raises:
        DataError: the data is not the one that the position was saved of.
    """
    if saved is None:
        return RestoredPosition(position, None)
    stateful = stateful_of(data)
    if "own" in saved and stateful is not None:
        # A copy: a data set may go on changing the state that it was given, and the caller may load it again.
        stateful.load_state_dict(copy.deepcopy(saved["own"]))
        return RestoredPosition(position, 0)
    sampler = sampler_of(data)
    # Saved of data of another kind: then batches are counted, as for any data.
    if "position" not in saved or sampler is None:
        return RestoredPosition(position, None)
    sampler.load_state_dict(saved["position"])
    if position.epoch_length != saved["batches"]:
        if (sampler.batches_in_epoch, group_size) != (saved["batches"], saved["group_size"]):
            raise DataError(
                f"the run to continue has epochs of {position.epoch_length} iterations over data of {saved['batches']} "
                f"batches, and this data has {sampler.batches_in_epoch}: give the same batch size, or begin anew"
            )
        return RestoredPosition(position, None)
    if position.iteration == position.epoch_began_at:
        sampler.load_state_dict({**saved["position"], "epoch": position.epochs_completed, "samples_taken": 0})
    if saved["position"]["length"] != sampler.length:  # grown between epochs: those before were as long as they were
        return RestoredPosition(replace(position, epoch_length=sampler.batches_in_epoch), sampler.next_batch)
    left = sampler.global_length - sampler.next_batch
    return RestoredPosition(
        translated(position, saved["group_size"], sampler.batches_in_epoch, group_size, left), sampler.next_batch
    )


def translated(position: RunPosition, old_group: int, length: int, group: int, left: int) -> RunPosition:
    """A position of a run whose epochs are passes, counted in iterations of another split of the same samples.

    Whole epochs, and whole accumulation groups of one that `max_iters` ends in, stay what they were.

    Args:
        position: as saved.
        old_group: iterations in an accumulation group then.
        length: iterations in an epoch now.
        group: iterations in an accumulation group now.
        left: iterations that the present epoch has left now.
    """
    assert position.epoch_length is not None
    old = position.epoch_length

    def moved(iterations: int) -> int:
        epochs, rest = divmod(iterations, old)
        return epochs * length + min(-(-rest // old_group) * group, length)

    # With the same split nothing is rounded, so that a run which stopped inside a group goes on exactly there.
    if (old, old_group) == (length, group):
        moved_begin, limit = position.epoch_began_at, position.max_iters
    else:
        moved_begin = moved(position.epoch_began_at)
        limit = None if position.max_iters is None else moved(position.max_iters)
    done = length - left if position.iteration > position.epoch_began_at else 0
    reached = moved_begin + done
    optimizer_steps = position.iteration - position.inner_iterations
    return replace(
        position,
        iteration=reached,
        epoch_began_at=moved_begin,
        epoch_length=length,
        max_iters=limit,
        inner_iterations=reached - optimizer_steps,  # the same groups, of another number of iterations
    )


class PositionHistory(Iterator[Any]):
    """Batches of a pass over data that has a state, with the states behind those that are not done.

    `done` says how many batches are done for good; states before that are forgotten.
    """

    def __init__(self, batches: Iterator[Any], stateful: Any, done: Callable[[], int | None]) -> None:
        self._batches = batches
        self._stateful = stateful
        self._done = done
        self._read = 0
        self._states: deque[tuple[int, Any]] = deque()
        self._remember()

    def __next__(self) -> Any:
        batch = next(self._batches, END)
        self._read += batch is not END
        done = self._done() or 0
        # The last state at or before what is done stays: it is what a save of this moment needs.
        while len(self._states) > 1 and self._states[1][0] <= done:
            self._states.popleft()
        self._remember()
        if batch is END:
            raise StopIteration
        return batch

    def behind(self, done: int, *, sees_end: bool) -> Any:
        """The data's state behind the first `done` batches of the pass.

        Where they are all of them and the end has been read, the state behind the end if `sees_end`, else before it:
        a run that resumes inside an epoch has to find its end.
        """
        known = [(read, state) for read, state in self._states if read <= done] or [self._states[0]]
        exact = [state for read, state in known if read == known[-1][0]]
        return exact[-1 if sees_end else 0]

    def bytes_of_state(self) -> float:
        """About how many bytes one of the states takes."""
        return bytes_of(self._states[-1][1])

    def last(self) -> Any:
        """The data's state behind all that was read."""
        return self._states[-1][1]

    def _remember(self) -> None:
        self._states.append((self._read, copied(self._stateful.state_dict())))


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


_UNCHANGING = frozenset({type(None), bool, int, float, complex, str, bytes})


def copied(value: Any) -> Any:
    """A copy on its own. Types other than those of states are left to `copy.deepcopy`, and so are their errors."""
    kind = type(value)
    if kind in _UNCHANGING:
        return value
    if kind is dict:
        return {copied(key): copied(item) for key, item in value.items()}
    if kind is list:
        return [copied(item) for item in value]
    if kind is tuple:
        return value if _UNCHANGING.issuperset(map(type, value)) else tuple(map(copied, value))
    if kind is torch.Tensor and not value.requires_grad:
        return value.clone()
    if kind is np.ndarray and not value.dtype.hasobject:
        return value.copy()
    return copy.deepcopy(value)
