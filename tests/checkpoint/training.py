"""A small training run with all that makes resuming hard: shuffling, dropout, a buffer, augmentation, a schedule."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from allstep import Engine, Events, World
from allstep.checkpoint import Checkpoint
from tests.regression import Killed

SAMPLES = 53
EPOCHS = 3


class Augmented(Dataset[Any]):
    """Draws from every global generator of the CPU."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        x = torch.full((6,), index / SAMPLES) + 0.1 * torch.randn(6)
        x += 0.1 * random.random() + 0.1 * np.random.rand()
        return x, index % 4, index


class Centred(nn.Module):
    """Subtracts a running mean, which is a buffer, as batch norm does, and takes single samples too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        return x - self.mean


@dataclass(frozen=True)
class Job:
    """How a run is set up."""

    folder: str
    workers: int = 0
    accumulate: int = 1
    most: int | None = None
    every: Any = 2
    keep_last: int = 3
    batch: int = 12
    window: int | None = None
    options: tuple[tuple[str, Any], ...] = ()


class Run:
    """Fresh objects of a job, as a started script makes them."""

    def __init__(self, world: World, job: Job, kill_at: int | None = None) -> None:
        world.seed_everything(5)
        model = nn.Sequential(nn.Linear(6, 16), Centred(), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.world, self.job, self.kill_at = world, job, kill_at
        self.model = world.wrap(model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.9)
        self.taken: list[tuple[int, int, list[int]]] = []
        self.engine = Engine(self.step, accumulate=job.accumulate)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.scheduler.step())
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, self.maybe_die)
        world.seed_everything(5, per_rank=True)
        self.data = world.loader(
            Augmented(),
            global_batch_size=job.batch,
            max_batch_per_rank=job.most,
            shuffle=True,
            num_workers=job.workers,
            **dict(job.options),
        )
        objects = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "engine": self.engine}
        self.checkpoint = Checkpoint(job.folder, objects, every=job.every, keep_last=job.keep_last).attach(self.engine)

    def step(self, engine: Engine, batch: Any) -> torch.Tensor:
        x, y, index = batch
        state = engine.state
        if not getattr(self, "is_open", False):
            self.optimizer.zero_grad()
        self.is_open = not state.group_end
        self.model.train()
        loss = F.cross_entropy(self.model(x), y)
        (loss * state.weight).backward()
        if state.group_end:
            self.optimizer.step()
        if state.active:
            self.taken.append((state.epoch, state.iteration, index.tolist()))
        return loss.detach()

    def maybe_die(self, engine: Engine) -> None:
        if engine.state.iteration == self.kill_at:
            raise Killed

    def go(self, *, resume: bool = True, epochs: int = EPOCHS) -> Run:
        if resume:
            self.checkpoint.resume()
        try:
            self.engine.run(self.data, max_epochs=epochs, window=self.job.window)
        except Killed as killed:
            killed.__traceback__ = None
            self.checkpoint.close()
            self.data._iterator = None
        return self

    def weights(self) -> list[torch.Tensor]:
        inner = self.world.unwrap(self.model)
        return [each.detach().clone() for each in (*inner.parameters(), *inner.buffers())]


def go_on(world: World, folder: str) -> tuple[list[torch.Tensor], range]:
    """Train what is left of the run in a folder, as its script would: the weights, and the iterations that it took."""
    run = Run(world, Job(folder, every="100 iterations", window=1)).go()
    return run.weights(), range(run.taken[0][1], run.engine.state.iteration + 1)


def folder_for(job: Job, name: str) -> Job:
    return Job(**{**vars(job), "folder": os.path.join(job.folder, name)})
