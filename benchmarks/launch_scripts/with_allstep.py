"""A few steps with allstep."""

from __future__ import annotations

import torch

import allstep

import marks


def main(world: allstep.World) -> None:
    model = world.wrap(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine: allstep.Engine, batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        marks.mark("first")
        if marks.strike(engine.state.iteration):
            engine.terminate(reason="left")
            raise SystemExit(0)
        return loss.detach()

    try:
        allstep.Engine(train_step).run([torch.ones(4, 8)] * marks.STEPS, max_epochs=1)
    finally:
        marks.clean_up()


if __name__ == "__main__":
    with allstep.init() as world:
        main(world)
