"""The order that a torch sampler draws, the same on every rank and in every run.

Contract: a `ShardedBatchSampler` that was given a sampler deals out `SamplerOrder.of(epoch)` in place of a permutation
of its own. A sampler of torch draws from its `generator`, or from torch's global one, so ranks that are seeded alike
would draw alike, but not in a run that goes on, and ranks that are not would each draw something else. Here the three
global generators and the sampler's own are seeded from (seed, epoch) while it draws, and put back afterwards. A sampler
with `set_epoch` is told the epoch first. What can go wrong: the sampler gives other things than integers, or not as
many as its `__len__` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DistributedSampler

from allstep.data.generators import generators_kept, seed_cpu_generators
from allstep.data.keys import key_of
from allstep.errors import DataError

_ORDERS = 4  # sets the seeds of samplers apart from other keys of the same seed and epoch


class SamplerOrder:
    """The dataset indices of each epoch, as `sampler` draws them for a seed."""

    def __init__(self, sampler: Iterable[int], seed: int) -> None:
        name = type(sampler).__name__
        if isinstance(sampler, DistributedSampler):
            raise DataError(
                f"sampler is a {name}, which deals samples to ranks, as this loader does; leave it out and give shuffle"
            )
        if not hasattr(sampler, "__len__"):
            raise DataError(f"{name} has no length; a sampler needs __len__, the indices that it gives in an epoch")
        self.sampler = sampler
        self._seed = seed
        generator = getattr(sampler, "generator", None)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        # A user who gives a generator of another seed wants other draws.
        self._own_seed = 0 if self._generator is None else self._generator.initial_seed()
        self._drawn: tuple[int, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def of(self, epoch: int) -> npt.NDArray[np.int64]:
        """The indices of epoch `epoch`, int64 of shape (length,). Raises DataError for what no sampler may give."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        return self._drawn[1]

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        name, key = type(self.sampler).__name__, key_of(self._seed, self._own_seed, epoch, _ORDERS)
        set_epoch: Any = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        with generators_kept(), _kept(self._generator):
            seed_cpu_generators(key)
            if self._generator is not None:
                self._generator.manual_seed(key >> 1)
            given = list(self.sampler)
        if not all(isinstance(index, int | np.integer) for index in given):
            raise DataError(f"{name} gives other things than integers; its indices cannot be dealt to ranks")
        if len(given) != len(self):
            raise DataError(f"{name} has a length of {len(self)} and gave {len(given)} indices; they must be as many")
        return np.array(given, dtype=np.int64)


@contextmanager
def _kept(generator: torch.Generator | None) -> Iterator[None]:
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)
