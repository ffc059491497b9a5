"""Engines over simulated ranks whose outputs tell which sample they are of."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from allstep import Engine
from allstep.coordination import Coordinator
from allstep.data import make_loader
from allstep.outputs import Gather


def predict(engine: Engine, batch: Any) -> Any:
    (x,) = batch
    return {"y_pred": torch.stack([x * 2, x * 3], 1), "y": x}


def ragged(engine: Engine, batch: Any) -> Any:
    (x,) = batch
    return {"wide": torch.ones(len(x), 1 + int(x.max()) % 3), "boxes": [torch.full((int(i) % 4, 2), int(i)) for i in x]}


def dealt_loader(coordinator: Coordinator, samples: int, *, shuffle: bool) -> DataLoader[Any]:
    """A rank's part of the numbers below `samples`, five at a time."""
    return make_loader(
        TensorDataset(torch.arange(samples)),
        rank=coordinator.data.rank,
        world_size=coordinator.data.size,
        seed=3,
        global_batch_size=5,
        shuffle=shuffle,
    )


def gathered(
    coordinator: Coordinator, gather: Gather, samples: int, *, shuffle: bool, step: Any = predict, epochs: int = 2
) -> Any:
    """What is in `state.gathered` after some epochs."""
    engine = Engine(step, coordinator=coordinator, uneven="longest", idle="skip")
    gather.attach(engine)
    engine.run(dealt_loader(coordinator, samples, shuffle=shuffle), max_epochs=epochs)
    return engine.state.gathered  # type: ignore[attr-defined]
