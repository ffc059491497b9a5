"""Trains from a DataLoader whose worker process meets the faults of the plan: item N is its iteration N."""

import torch
from torch.utils.data import DataLoader, Dataset

import allstep
from allstep import Engine, faults


class Items(Dataset):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        faults.strike(faults.RankPosition("data", self.rank, iteration=index))
        return torch.ones(1)


if __name__ == "__main__":
    with allstep.init() as world:
        loader = DataLoader(Items(world.rank), batch_size=2, num_workers=1)
        Engine(lambda engine, batch: world.all_reduce(1.0)).run(loader, max_epochs=3)
