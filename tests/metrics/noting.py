"""Metrics and data for tests of `Metrics`."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric

from allstep import Alone, Engine
from allstep.metrics import Metrics
from tests.metrics.worlds import take


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(n, 4, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def alone(metrics: Metrics, data: list[Any], epochs: int = 1, **attach: Any) -> Engine:
    engine = Engine(take, coordinator=Alone())
    metrics.attach(engine, **attach)
    engine.run(data, max_epochs=epochs)
    return engine


class Noting(Metric):
    """Counts its updates and notes what it was given."""

    full_state_update = False
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, preds: Any, target: Any = None) -> None:
        self.given.append((preds, target))
        self.count += 1

    def compute(self) -> torch.Tensor:
        return self.count
