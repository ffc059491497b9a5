"""A copy of a state that goes on changing, taken after every batch and hardly ever read, so it has to be cheap.

Contract: `copied(state)` shares nothing that can change with `state`. It is what `copy.deepcopy` gives, several times
as fast for what states are made of: containers, numbers, the tuples of random generators, tensors and arrays. Of a
view only its own elements are copied and not all that it is a view of. Two places that hold one object hold two
copies. What can go wrong: a state that holds itself is a RecursionError; a checkpoint could not keep it either.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

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
