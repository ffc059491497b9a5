"""`DeterministicEngine`: Ignite's engine whose data is drawn the same way again, on allstep's loop.

Contract: a run draws a seed when it starts, and each pass over the data is seeded by that and its place in the run. The
batches of a DataLoader over a map-style dataset are drawn when a pass begins, so that one that goes on inside it skips
to its place without reading; of other data, batches are read and dropped. The random generators go on as they were
saved. allstep's own loaders need none of this: their order depends on the seed and the epoch alone.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import proxy

from ignite.engine.deterministic import ReproducibleBatchSampler, update_dataloader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from allstep.engine import Events
from allstep.ignite.ignite_engine import IgniteEngine
from allstep.ignite.ignite_private import DeterministicNames


class SkippingBatchSampler(ReproducibleBatchSampler):
    """Ignite's sampler of batches that are drawn beforehand; allstep's loop tells it where to begin.

    Args:
        batch_sampler: draws the batches.
        drawn: called when those of a pass are drawn.
    """

    def __init__(self, batch_sampler: BatchSampler, drawn: Callable[[], None]) -> None:
        super().__init__(batch_sampler)
        self.drawn = drawn

    def skip_batches(self, batches: int) -> None:
        """Begin the next pass behind so many batches."""
        self.start_iteration = batches

    def __iter__(self) -> Iterator[Any]:
        self.setup_batch_indices()
        self.drawn()
        yield from self.batch_indices


class DeterministicEngine(DeterministicNames, IgniteEngine):
    """An engine that reads the same data in the same order when a run is started again or goes on.

    Args:
        process_function: the step, `(engine, batch) -> output`.
        options: keyword arguments of `allstep.Engine`.
    """

    def __init__(self, process_function: Callable[[Any, Any], Any], **options: Any) -> None:
        self._opens_data, self._to_drop = False, 0
        IgniteEngine.__init__(self, process_function, **options)
        self.begin_as_deterministic()

    def state_dict(self) -> OrderedDict[str, Any]:
        """Where the run stands, with the states of the random generators."""
        state = IgniteEngine.state_dict(self)
        state["rng_states"] = self.random_states()
        return state

    def prepare_data(self, data: Any) -> Any:
        """A loader whose batches are drawn beforehand, in place of one that draws them one by one.

        Raises:
            ValueError: there is no data.
        """
        if data is None and self.state.dataloader is None:
            raise ValueError("Deterministic engine does not support the option of data=None. Please, provide data")
        self._opens_data = True
        # Of an iterator that is new to this run all that earlier epochs read is dropped, and not this epoch's alone.
        is_new_iterator = hasattr(data, "__next__") and data is not self.state.dataloader
        self._to_drop = self.extension.epoch_began_at if is_new_iterator and not self.begins_anew else 0
        sampler = getattr(data, "batch_sampler", None)
        draws = isinstance(data, DataLoader) and not isinstance(getattr(data, "dataset", None), IterableDataset)
        if not draws or sampler is None or isinstance(sampler, ReproducibleBatchSampler):
            return data
        if hasattr(data.sampler, "epoch") and len(data) != self.state.epoch_length:
            warnings.warn(
                "the epoch's length is not the loader's, so that a sampler that is told the epoch cannot be drawn the "
                "same way again; leave out epoch_length",
                stacklevel=4,
            )
        return update_dataloader(
            data, SkippingBatchSampler(sampler, partial(DeterministicEngine._take_up, proxy(self)))
        )

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        is_drawn_later = isinstance(getattr(self.state.dataloader, "batch_sampler", None), SkippingBatchSampler)
        if event_name is Events.GET_BATCH_STARTED and not is_drawn_later:
            self._take_up()
        IgniteEngine._fire_event(self, event_name, *event_args, **event_kwargs)
        # An iterator is read from before its first epoch begins, to know whether there is one.
        opens = Events.STARTED if hasattr(self.state.dataloader, "__next__") else Events.EPOCH_STARTED
        if self._opens_data and event_name is opens:
            sampler = getattr(self.state.dataloader, "batch_sampler", None)
            self.seed_first_pass(is_drawn_by_sampler=isinstance(sampler, ReproducibleBatchSampler))
            for _ in range(self._to_drop):
                next(self.state.dataloader, None)
            self._to_drop = 0

    def _take_up(self) -> None:
        """Go on with the random generators as they were saved, once what opening the data draws is drawn."""
        if self._opens_data:
            self._opens_data = False
            self.take_up_random_states()
