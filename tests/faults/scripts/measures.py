"""Rank 1's metric has a state of another shape."""

import torch
from torchmetrics import Metric

import allstep
from allstep import Engine
from allstep.metrics import Metrics


class Held(Metric):
    full_state_update = False
    held: torch.Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.add_state("held", torch.zeros(length), "sum")

    def update(self, value: float) -> None:
        self.held = self.held + value

    def compute(self) -> torch.Tensor:
        return self.held.sum()


if __name__ == "__main__":
    with allstep.init() as world:
        engine = Engine(lambda engine, batch: batch)
        Metrics({"held": Held(200_000 if world.rank == 1 else 2)}).attach(engine)
        print("measuring", flush=True)
        engine.run([1.0, 2.0])
