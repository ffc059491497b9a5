"""What an Engine can see of the data it is given: the loaders inside it, whether it can be read again, who deals it.

Contract: before each pass an Engine calls `tell_data_epoch`, which reaches whoever has `set_epoch`: the data itself,
or the sampler and the dataset of a DataLoader, and where the data is neither, the DataLoaders that it holds in
attributes and containers, such as Lightning's `CombinedLoader`. A composition that hides its loaders in a closure is
not seen through; a shuffling loader of allstep in it warns when it is read again in the same order. `is_one_shot` says
whether what data gave is gone. `whole_dataset_of` finds a DataLoader that reads all of its dataset on each rank. All
but the first are pure.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from allstep.data.epochs import tell_epoch

_DEEPEST = 3  # attributes of attributes that are looked at for loaders
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_WHOLE = (SequentialSampler, *_RANDOM)
_MOST_PARTS = 256  # of a dataset that are looked at to tell it from another rank's
_MOST_IN_A_LEVEL = 4096  # attributes and elements that are looked at for loaders, of each depth
_MOST_ELEMENTS = 64  # of a tensor, evenly spaced


def tell_data_epoch(data: Any, epoch: int) -> None:
    """Tell the data of a pass the epoch, counted from 0."""
    hook = hook_of(data, "set_epoch")
    if hook is not None:
        hook(epoch)
    if isinstance(data, DataLoader):
        if not callable(getattr(data, "set_epoch", None)):
            tell_epoch(data.dataset, epoch)
    elif hook is None and not isinstance(data, Sequence):
        for loader in loaders_inside(data):
            tell_data_epoch(loader, epoch)


def hook_of(data: Any, name: str) -> Callable[[int], object] | None:
    """The method `name` of the data, or of a sampler of it, from the outside in."""
    # A batch sampler may hand the call on to the sampler it wraps.
    batch_sampler = getattr(data, "batch_sampler", None)
    for owner in (data, batch_sampler, getattr(batch_sampler, "sampler", None), getattr(data, "sampler", None)):
        hook = getattr(owner, name, None)
        if callable(hook):
            return hook  # type: ignore[no-any-return]
    return None


def loaders_inside(data: Any) -> list[DataLoader[Any]]:
    """The DataLoaders that data holds in its attributes, in containers or in iterables among them."""
    found: dict[int, DataLoader[Any]] = {}
    seen: set[int] = set()
    level = [data]
    # Level by level, so that a large data set beside the loaders does not use up what may be looked at.
    for _ in range(_DEEPEST + 2):
        below: list[Any] = []
        for value in level:
            if isinstance(value, DataLoader):
                found[id(value)] = value
            elif id(value) not in seen:
                seen.add(id(value))
                below += islice(_held_by(value), min(_MOST_PARTS, _MOST_IN_A_LEVEL - len(below)))
        level = below
    return list(found.values())


def _held_by(value: Any) -> Iterable[Any]:
    """What a container, or an iterable with attributes, holds; nothing of all else."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    if hasattr(value, "__iter__") and hasattr(value, "__dict__") and not isinstance(value, type):
        attributes: dict[str, Any] = vars(value)
        return attributes.values()
    return ()


def draws_each_pass(data: Any) -> str:
    """The name of a plain DataLoader's sampler of torch's that draws an order of its own for each pass, else empty."""
    if not isinstance(data, DataLoader):
        return ""
    sampler = data.sampler if data.batch_sampler is None else getattr(data.batch_sampler, "sampler", None)
    return type(sampler).__name__ if isinstance(sampler, _RANDOM) else ""


def is_one_shot(data: Any) -> bool:
    """Whether data is an iterator, so that what it gave is gone.

    A class that has `__next__` and an `__iter__` that does more than give back the object begins anew in it.
    """
    if not hasattr(data, "__next__"):
        return False
    code = getattr(inspect.unwrap(getattr(type(data), "__iter__", iter)), "__code__", None)
    if code is None:  # written in C, as those of generators, files, map and zip
        return True
    is_generator = bool(code.co_flags & inspect.CO_GENERATOR)
    return not is_generator and not code.co_names and not code.co_freevars


def whole_dataset_of(data: Any) -> tuple[str, int] | None:
    """Of a plain DataLoader that reads a dataset from end to end: its sampler and a fingerprint of the dataset.

    None where somebody deals the samples to ranks, or may do. Ranks whose fingerprints differ have other datasets.
    """
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    sampler = data.sampler if data.batch_sampler is None else getattr(data.batch_sampler, "sampler", None)
    if type(sampler) not in _WHOLE or hasattr(data.batch_sampler, "counts"):
        return None
    return type(sampler).__name__, fingerprint((data.dataset, vars(sampler)))


def fingerprint(value: Any) -> int:
    """A number that is the same for what looks the same in another process, from a bounded look at it."""
    crc = 0
    for part in islice(_parts(value, 0), _MOST_PARTS):
        crc = zlib.crc32(part, crc)
    return crc


def _parts(value: Any, depth: int) -> Iterator[bytes]:
    yield type(value).__qualname__.encode()
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1) if value.layout is torch.strided else None
        yield str((tuple(value.shape), value.dtype)).encode()
        if flat is not None and flat.device.type != "meta":
            yield str(flat[:: max(1, len(flat) // _MOST_ELEMENTS)].tolist()).encode()
    elif isinstance(value, np.ndarray):
        yield str((value.shape, value.dtype)).encode()
        if not value.dtype.hasobject:
            flat_array = value.reshape(-1)
            yield flat_array[:: max(1, len(flat_array) // _MOST_ELEMENTS)].tobytes()
    elif isinstance(value, str | bytes | int | float | bool | range | slice | type(None)):
        yield repr(value).encode()
    elif depth > _DEEPEST or isinstance(value, torch.Generator):
        return
    elif isinstance(value, Mapping):
        for entry in islice(value.items(), _MOST_ELEMENTS):
            yield from _parts(entry, depth)
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        for part in value[:: max(1, len(value) // _MOST_ELEMENTS)]:
            yield from _parts(part, depth + 1)
    else:
        yield from _parts(getattr(value, "__dict__", None), depth + 1)
