"""Datasets whose samples show what was drawn from which generator: module-level, so that workers can be spawned."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from allstep.data import shard


class Draws(Dataset):
    """Sample i is i and one draw from each global generator, after `i % 3` draws more."""

    classes = ("a", "b")

    def __init__(self, length: int = 22) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        for _ in range(index % 3):
            random.random(), np.random.rand(), torch.rand(1)
        drawn = [random.random(), np.random.normal(), torch.rand(1, dtype=torch.float64).item()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class ManyDraws(Draws):
    """Like `Draws`, read only by many indices at once."""

    def __init__(self, length: int = 22) -> None:
        super().__init__(length)
        self.asked: list[list[int]] = []

    def __getitem__(self, index: int) -> torch.Tensor:
        raise AssertionError("this dataset is read by __getitems__")

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        self.asked.append(indices)
        return [Draws.__getitem__(self, index) for index in indices]


class Failing(Draws):
    def __getitem__(self, index: int) -> torch.Tensor:
        super().__getitem__(index)
        raise LookupError(f"sample {index} cannot be read")


class Stream(IterableDataset):
    """0 to `length` in order, this worker's part of it; keeps the epoch it is told."""

    def __init__(self, length: int = 30) -> None:
        self.length = length
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        for element in shard(range(self.length)):
            yield element, self.epoch


class EagerStream(Stream):
    """Asks for its shard in `__iter__` itself, not when the first element is asked for."""

    def __iter__(self):
        return iter(list(shard(range(self.length))))


class Whoever(Dataset):
    """Sample i is i and the seed of the worker that reads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, int]:
        worker = get_worker_info()
        return index, -1 if worker is None else worker.seed


def collate_with_noise(samples: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    return torch.stack(samples), random.random()
