"""Copies of states: equal, of the same types, and untouched by what becomes of the state."""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from allstep.engine.position import copied


class Unknown:
    """Something whose insides nobody knows."""

    def __init__(self) -> None:
        self.rows = [1]

    def __repr__(self) -> str:
        return f"Unknown of {self.rows}"


def test_a_state_comes_back_with_its_types() -> None:
    state = {"at": 3, 4: [1.5, None, True], "rng": random.Random(0).getstate(), "names": ("a", b"b", 1j)}
    assert copied(state) == state == copy.deepcopy(state)
    assert type(copied(state)["names"]) is tuple


@pytest.mark.parametrize(
    ("state", "change"),
    [
        ({"rows": [1]}, lambda state: state["rows"].append(2)),
        ((1, [1]), lambda state: state[1].append(2)),
        ([torch.ones(2)], lambda state: state[0].zero_()),
        ([np.ones(2)], lambda state: state[0].fill(0)),
        ([np.array([[1], None], dtype=object)], lambda state: state[0][0].append(2)),
        ([torch.nn.Parameter(torch.ones(2))], lambda state: state[0].data.zero_()),
        ([deque([[1]])], lambda state: state[0][0].append(2)),
        ([Unknown()], lambda state: state[0].rows.append(2)),
    ],
    ids=["dict", "tuple", "tensor", "array", "objects", "parameter", "deque", "unknown"],
)
def test_what_becomes_of_the_state_does_not_change_its_copy(state: Any, change: Any) -> None:
    kept, expected = copied(state), repr(state)
    change(state)
    assert repr(state) != expected == repr(kept)


def test_of_a_view_only_its_own_elements_are_copied() -> None:
    rows = torch.zeros(1000, 4)
    assert copied({"row": rows[3]})["row"].untyped_storage().nbytes() == 16
