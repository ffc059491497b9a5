"""What is kept of a batch that a step may change."""

from __future__ import annotations

from collections import UserDict, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from allstep.engine.filler import KeptBatch


@dataclass
class Fields:
    x: torch.Tensor


class Stubborn:
    def __init__(self) -> None:
        self.x = 1

    def __copy__(self) -> Any:
        raise RuntimeError("not to be copied")


def test_each_copy_is_as_the_batch_was_when_it_was_kept() -> None:
    batch = {"x": torch.tensor([1.0]), "n": [np.array([2.0])], "f": Fields(torch.tensor([3.0])), "t": "text"}
    kept = KeptBatch(batch)
    for changed in (batch, kept.copy()):
        changed["x"] += 1
        changed["n"].pop()[:] = 0
        changed["f"].x = torch.tensor([0.0])
        del changed["t"]
    again = kept.copy()
    assert (again["x"].item(), again["n"][0].item(), again["f"].x.item(), again["t"]) == (1.0, 2.0, 3.0, "text")


@pytest.mark.parametrize("kind", [dict, UserDict, lambda items: defaultdict(list, items)])
def test_a_mapping_is_kept_as_what_it_was(kind: Any) -> None:
    batch = kind({"x": torch.tensor([1.0])})
    kept = KeptBatch(batch)
    batch.pop("x")
    assert type(kept.copy()) is type(batch)
    assert kept.copy()["x"].tolist() == [1.0]


def test_whether_a_tensor_requires_gradients_is_kept() -> None:
    assert KeptBatch(torch.ones(2, requires_grad=True)).copy().requires_grad
    assert KeptBatch(torch.ones(2, requires_grad=True)).copy().is_leaf


def test_what_refuses_to_be_copied_is_kept_itself() -> None:
    batch = Stubborn()
    assert KeptBatch(batch).copy() is batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_device_memory_is_held_for_a_filler() -> None:
    before = torch.cuda.memory_allocated()
    batch = {"x": torch.ones(2**20, device="cuda")}
    kept = KeptBatch(batch)
    del batch
    assert torch.cuda.memory_allocated() == before
    copy = kept.copy()["x"]
    assert copy.is_cuda
    assert float(copy.sum()) == 2**20
