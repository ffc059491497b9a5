"""Results as plain numbers: what a log, a JSON file or a message takes.

Contract: `to_numbers` is pure and asks no other rank. It waits for the device of each tensor that it is given. What has
no numbers is an error that says where in the structure it is, so that a log is not filled with texts of objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

from allstep.errors import ArgumentTypeError
from allstep.parallel.dtensor import is_dtensor


def to_numbers(value: Any) -> Any:
    """A nested structure of results in Python's own numbers, texts, lists and dictionaries, for `json.dumps` and logs.

    A tensor or an array of no dimension becomes a number, others become nested lists. Tuples and sets become lists.

    Args:
        value: a tensor, an array, a number, a text, None, or a mapping or sequence of such, at any depth. Keys of
            mappings that are no texts or numbers become texts.

    Raises:
        ArgumentTypeError: something in it is none of these, or a complex number.
    """
    return _to_numbers(value, "value")


def _to_numbers(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    # A subclass, such as numpy's float64 or an enumeration, is written by its own rules; its plain value is meant.
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, torch.Tensor):
        if is_dtensor(value):
            raise ArgumentTypeError(f"{path} is a DTensor, of which each rank holds a part; give its .full_tensor()")
        if value.is_complex():
            raise ArgumentTypeError(f"{path} is complex; give its .real and .imag, or its .abs()")
        on_host = value.detach().cpu().to_dense() if value.layout != torch.strided else value.detach().cpu()
        # Eight-bit floats have no list of their own; float64 holds each of their values.
        return (on_host.double() if on_host.is_floating_point() else on_host).tolist()
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufU":
        return value.tolist()
    if isinstance(value, Mapping):
        return {_key(key): _to_numbers(item, f"{path}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray):
        return [_to_numbers(item, f"{path}[{at}]") for at, item in enumerate(value)]
    raise ArgumentTypeError(
        f"{path} is a {type(value).__name__}; it must be made of tensors, arrays, numbers and texts"
    )


_PLAIN = (bool, int, float, str, type(None))


def _key(key: Any) -> Any:
    return key if type(key) in _PLAIN else str(key)
