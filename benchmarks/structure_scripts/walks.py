"""A small job over two ranks, with or without the one thing whose walk through the code is asked for.

Usage: allstep run --nproc 2 walks.py NAME with|without FOLDER
"""

from __future__ import annotations

import sys

import torch
from torchmetrics import MeanMetric

import allstep
from allstep import Engine, Events


def main(world: allstep.World, name: str, *, present: bool, folder: str) -> None:
    model = world.wrap(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        if name == "failure" and present and world.rank == 1 and engine.state.iteration == 3:
            raise ValueError("the failure whose walk this is")
        optimizer.zero_grad()
        loss = model(batch).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    alone = allstep.Alone() if name == "vote" and not present else None
    trainer = Engine(step, coordinator=alone)
    if name == "metric" and present:
        allstep.Metrics({"loss": MeanMetric()}).attach(trainer)
    if name == "save":
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: None)
        if present:
            allstep.Checkpoint(folder, {"trainer": trainer, "model": model}, every=4).attach(trainer)
    data = [torch.ones(4, 2) for _ in range(6)]
    if name != "batch" or present:
        trainer.run(iter(data) if name == "vote" else data, max_epochs=1)


if __name__ == "__main__":
    with allstep.init(seed=0, device="cpu") as the_world:
        main(the_world, sys.argv[1], present=sys.argv[2] == "with", folder=sys.argv[3])
