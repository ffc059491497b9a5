"""Moving a batch, whatever it is made of, to a device, and building it anew.

Contract: tensors anywhere in the structure are moved; containers come back as new ones of the same type with
everything else they held; other leaves are the same objects. Nothing given is changed, except a module, whose `to`
moves it in place. `rebuilt` does the same with any other function in the place of moving.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from allstep.world.xla_private import placed

T = TypeVar("T")

_BLOCKING = ("cpu", "mps", "xla")  # where a copy is complete on return, or whose runtime orders it by itself
_LEAVES = (torch.Tensor, np.ndarray, str, bytes, int, float, type(None))


def to_device(value: T, device: torch.device, *, non_blocking: bool = True) -> T:
    """Move all tensors of a nested structure to a device.

    A copy from pinned memory to a CUDA device, or one like it, does not make the host wait; later work on that device
    comes after it in any case. A copy to the CPU is always complete on return. A tensor that is there already is
    returned itself.

    Args:
        value: a tensor, an object with a `to(device)` method (a `PackedSequence`, a tokenizer's batch, a module), or a
            mapping, list, tuple, named tuple or dataclass instance of such, at any depth. Anything else is a leaf.
        device: where to.
        non_blocking: False makes the host wait for copies to CUDA and its like too.
    """
    return cast(T, _move(value, device, non_blocking and device.type not in _BLOCKING))


def placing(device: torch.device) -> Callable[[Any], Any] | None:
    """What a loader begins to move its next batch with: to XLA, whose copies nobody waits for; None elsewhere."""
    return partial(to_device, device=device) if device.type == "xla" else None


def rebuilt(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A nested structure with new containers, so that what is put into, or taken out of, one is not of the other.

    Args:
        value: a mapping, list, tuple, named tuple or dataclass instance, at any depth. An object with attributes of
            its own, such as one of a batch class, is copied as `copy.copy` does; anything else is a leaf.
        leaf: gives what stands in a leaf's place.
    """
    if isinstance(value, _LEAVES):
        return leaf(value)
    found = _container(value, lambda item: rebuilt(item, leaf))
    if found is not value:
        return found
    has_attributes = hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | nn.Module)
    return copy.copy(value) if has_attributes else leaf(value)


def _move(value: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return placed(value, device) if device.type == "xla" else value.to(device, non_blocking=non_blocking)
    if isinstance(value, str | bytes | int | float | None):
        return value
    # Asked of the type: an instance may answer any attribute, as a mock or a lazy record does.
    if callable(getattr(type(value), "to", None)):
        return value.to(device)
    return _container(value, lambda item: _move(item, device, non_blocking))


def _container(value: Any, of_item: Callable[[Any], Any]) -> Any:
    """A container with `of_item` of each thing in it; what is none is returned itself."""
    if isinstance(value, Mapping):
        moved = {key: of_item(item) for key, item in value.items()}
        return _mapping_like(value, moved)
    if isinstance(value, list | tuple):
        items = [of_item(item) for item in value]
        return _sequence_like(value, items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not built anew: that would run `__post_init__` again, and a field may not be an argument.
        twin = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                object.__setattr__(twin, field.name, of_item(getattr(value, field.name)))
        return twin
    return value


def _mapping_like(value: Mapping[Any, Any], moved: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(value) is dict:
        return moved
    if isinstance(value, MutableMapping):
        # A shallow copy keeps what a subclass holds beside its items, such as a default factory.
        twin = copy.copy(value)
        twin.update(moved)
        return twin
    return type(value)(moved)  # type: ignore[call-arg]


def _sequence_like(value: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    if type(value) is list:
        return items
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*items)
    if isinstance(value, tuple):
        return type(value)(items)
    twin = copy.copy(value)
    twin[:] = items
    return twin
