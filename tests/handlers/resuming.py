"""A small training job with a handler to be tested, that can end in its middle and go on, at any world size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from allstep import Checkpoint, Engine, Events, World, create_supervised_trainer
from allstep.testing import run_ranks
from tests.regression import Killed, same

SAMPLES = 36


@dataclass
class Job:
    """One start of the script, before it trains."""

    world: World
    model: nn.Module
    optimizer: torch.optim.Optimizer
    trainer: Engine
    rates: dict[int, list[float]] = field(default_factory=dict)


Attach = Callable[[Job], Mapping[str, Any]]
"""Attaches handlers to a job; returns those with a state, by names for the results."""


def started(world: World, *, accumulate: int = 1, batch_norm: bool = True) -> Job:
    world.seed_everything(7)
    layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if batch_norm else []), nn.ReLU(), nn.Linear(8, 3)]
    model = world.wrap(nn.Sequential(*layers))
    groups = [{"params": [p], "name": name} for name, p in world.unwrap(model).named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy, gradient_accumulation_steps=accumulate)
    return Job(world, model, optimizer, trainer)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long())


def trained(
    world: World,
    folder: str,
    attach: Attach,
    kill_at: int | None = None,
    accumulate: int = 1,
    batch: int = 6,
    epochs: int = 3,
    batch_norm: bool = True,
) -> dict[str, Any]:
    """Start the script, go on from what is in the folder, and train to the end or until it is killed."""
    job = started(world, accumulate=accumulate, batch_norm=batch_norm)
    handlers = attach(job)

    @job.trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Engine) -> None:
        job.rates[engine.state.iteration] = [group["lr"] for group in job.optimizer.param_groups]
        if engine.state.iteration == kill_at:
            raise Killed

    checkpoint = Checkpoint(folder, every=accumulate).attach(job.trainer)  # finds by itself what has a state
    checkpoint.resume()
    loader = world.loader(dataset(), global_batch_size=batch, shuffle=True)
    try:
        job.trainer.run(loader, max_epochs=epochs)
    except Killed:
        checkpoint.close()
    return {
        "model": {name: value.clone() for name, value in world.unwrap(job.model).state_dict().items()},
        "handlers": {name: each.state_dict() for name, each in handlers.items()},
        "rates": job.rates,
    }


def check_resumes_exactly(folder: Path, attach: Attach, *, ranks: int = 2, kill_at: int = 9, **how: Any) -> Any:
    """Train unbroken, and killed and started again; every rank must end alike. Returns the unbroken results."""
    train = partial(trained, **how)
    whole = run_ranks(train, ranks, str(folder / "whole"), attach)
    run_ranks(train, ranks, str(folder / "killed"), attach, kill_at)
    resumed = run_ranks(train, ranks, str(folder / "killed"), attach)
    for unbroken, broken in zip(whole, resumed, strict=True):
        assert min(broken["rates"]) > 1
        assert same(broken["rates"], {at: each for at, each in unbroken["rates"].items() if at in broken["rates"]})
        assert same(unbroken["model"], broken["model"])
        assert same(unbroken["handlers"], broken["handlers"])
    return whole
