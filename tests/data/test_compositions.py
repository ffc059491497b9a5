"""What is looked at to find loaders in data of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from allstep.data import make_loader
from allstep.data.compositions import loaders_inside


class Counted(list[Any]):
    """A list that counts how often lists of its kind are gone through."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        Counted.passes += 1
        return super().__iter__()


class Corpus:
    """Texts that are held in memory, as lists of lists, and a loader beside them."""

    def __init__(self, loader: Any) -> None:
        self.texts = Counted(Counted(Counted([0]) for _ in range(200)) for _ in range(200))
        self.beside = {"loader": loader}

    def __iter__(self) -> Iterator[Any]:
        return iter(self.texts)


def test_a_large_data_set_in_memory_is_not_walked_through_for_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(TensorDataset(torch.arange(4)), rank=0, world_size=1, seed=0, batch_size=2)
    corpus = Corpus(loader)
    monkeypatch.setattr(Counted, "passes", 0)
    assert loaders_inside(corpus) == [loader]
    assert Counted.passes < 10_000
