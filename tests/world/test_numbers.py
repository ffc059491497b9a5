"""Results in plain numbers."""

from __future__ import annotations

import enum
import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from allstep.errors import ArgumentTypeError
from allstep.world import to_numbers


class Phase(enum.IntEnum):
    TRAIN = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor([0.5]).to(torch.float8_e4m3fn), [0.5]),
        (torch.tensor(3), 3),
        (torch.tensor([True, False]), [True, False]),
        (torch.ones(2, 2, requires_grad=True), [[1.0, 1.0], [1.0, 1.0]]),
        (torch.eye(2).to_sparse(), [[1.0, 0.0], [0.0, 1.0]]),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.array([1, 2]), [1, 2]),
        (np.array(["a"]), ["a"]),
        (Phase.TRAIN, 3),
        ((1, "a", None), [1, "a", None]),
        ({(0, 1): torch.tensor(2)}, {"(0, 1)": 2}),
        (OrderedDict(loss=torch.tensor(0.5), nested={"n": [torch.tensor(1)]}), {"loss": 0.5, "nested": {"n": [1]}}),
    ],
)
def test_results_become_what_json_takes(value: Any, plain: Any) -> None:
    found = to_numbers(value)
    assert found == plain
    assert type(found) is type(plain)
    assert json.loads(json.dumps(found)) == plain


@pytest.mark.parametrize("value", [object(), torch.tensor(1j), b"bytes", 1j])
def test_what_has_no_numbers_is_named_by_its_place(value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"value\['epoch'\]\[1\] is "):
        to_numbers({"epoch": [1, value]})
