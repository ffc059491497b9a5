"""Trains on a stream of unknown length, which is read ahead so that ranks can agree, and saves its weights at the end.

python -m tests.faults.streaming_job FOLDER OUT own|none

The stream knows its state ("own"), or can only be read ("none"). Ranks have different numbers of batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import allstep
from allstep import Checkpoint, Engine, Events, World

BATCHES = (13, 11)
BATCH = 4
EPOCHS = 2


class Stream(IterableDataset[torch.Tensor]):
    """Samples drawn one after another, the same in each epoch; rank 0 has more of them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.rank)
        for _ in range(BATCHES[self.rank] * BATCH):
            yield torch.rand(8, generator=generator)


class Knowing(Stream):
    """Goes on drawing from epoch to epoch, and knows where it is."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.generator = torch.Generator().manual_seed(rank)
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < BATCHES[self.rank] * BATCH:
            self.at += 1
            yield torch.rand(8, generator=self.generator)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        self.generator.set_state(state["generator"])


def train(world: World, folder: str, kind: str) -> list[torch.Tensor]:
    """Train on the ranks of this world and give the weights."""
    world.seed_everything(7)
    model = world.wrap(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    world.seed_everything(7, per_rank=True)

    def step(engine: Engine, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        (model(x).square().mean() * engine.state.weight).backward()
        optimizer.step()

    trainer = Engine(step, uneven="longest")
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
    Checkpoint(folder, objects, every="3 iterations").attach(trainer).resume()
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: print(f"iteration {trainer.state.iteration}", flush=True)
    )
    stream = (Knowing if kind == "own" else Stream)(world.rank)
    trainer.run(DataLoader(stream, batch_size=BATCH), max_epochs=EPOCHS)
    return [each.detach() for each in world.unwrap(model).parameters()]


def main(folder: str, out: str, kind: str) -> None:
    with allstep.init() as world:
        weights = train(world, folder, kind)
        if world.is_main:
            torch.save(weights, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
