"""A few steps with accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator

import marks


def main() -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(8, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(1, marks.STEPS + 1):
        loss = model(torch.ones(4, 8)).square().mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        marks.mark("first")
        marks.strike(step)
    accelerator.end_training()


if __name__ == "__main__":
    main()
