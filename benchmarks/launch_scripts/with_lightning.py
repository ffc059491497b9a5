"""A few steps with Lightning, which starts its other processes itself."""

from __future__ import annotations

import os

import torch
from lightning import LightningModule, Trainer

import marks


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.seen = 0

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def on_train_batch_end(self, outputs: object, batch: torch.Tensor, index: int) -> None:
        self.seen += 1
        marks.mark("first")
        marks.strike(self.seen)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    Trainer(
        accelerator="cpu",
        devices=int(os.environ["BENCH_RANKS"]),
        strategy="ddp",
        max_steps=marks.STEPS,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), torch.utils.data.DataLoader(torch.ones(4 * marks.STEPS, 8), batch_size=2))
