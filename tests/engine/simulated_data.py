"""Data and steps for engines on simulated ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from allstep.engine import Engine
from allstep.testing import SimulatedRank, simulate


def batches(n: int, *, rows: int = 2, start: int = 0) -> list[torch.Tensor]:
    return [torch.full((rows,), float(start + at)) for at in range(n)]


class Names:
    """A step that notes the batches that were this rank's own."""

    def __init__(self) -> None:
        self.own: list[int] = []

    def __call__(self, engine: Engine, batch: Any) -> None:
        if engine.state.active:
            self.own.append(int(batch[0]))


def raised_everywhere(world: Any, size: int, kind: type[Exception]) -> list[str]:
    """What each rank raised, which must be of this kind on all of them."""

    def one(coordinator: SimulatedRank) -> str:
        with pytest.raises(kind) as caught:
            world(coordinator)
        return str(caught.value)

    return simulate(one, size, timeout=30.0)


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n
        self.read = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for at in range(self.n):
            self.read += 1
            yield torch.tensor(float(at))


class Counted(Dataset[torch.Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n
        self.read = 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: int) -> torch.Tensor:
        self.read += 1
        return torch.tensor(float(at))


class Lies(Sampler[int]):
    def __init__(self, declared: int, given: int) -> None:
        self.declared = declared
        self.given = given

    def __len__(self) -> int:
        return self.declared

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.given))
