"""Two models, two optimizers and two losses in one step, with a dictionary as its output.

    allstep run --nproc 2 examples/multi_model.py

An autoencoder learns to compress scikit-learn's handwritten digits to eight numbers, while a classifier learns to read
the digit from those eight numbers alone. Each model has its own optimizer and its own loss; the step returns both
losses and the accuracy as a dictionary, which handlers read from `engine.state.output`.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import allstep
from allstep import Engine, Events

from digits import digits


class Autoencoder(nn.Module):
    """64 pixels to `width` numbers and back; returns (reconstruction, code)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, width))
        self.decode = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 1, 8, 8) to (reconstruction (N, 64), code (N, width))."""
        code = self.encode(images)
        return self.decode(code), code


def main(world: allstep.World, epochs: int) -> dict[str, float]:
    """Train both models; returns the means of the last epoch over all ranks."""
    world.seed_everything(2)
    train_set, _ = digits()
    autoencoder = world.wrap(Autoencoder())
    classifier = world.wrap(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10)))
    autoencoder_optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3)
    classifier_optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)
    loader = world.loader(train_set, global_batch_size=64, shuffle=True)

    def train_step(engine: Engine, batch: object) -> dict[str, torch.Tensor]:
        images, labels = world.to_device(batch)
        reconstruction, code = autoencoder(images)
        reconstruction_loss = F.mse_loss(reconstruction, images.flatten(1))
        autoencoder_optimizer.zero_grad()
        (reconstruction_loss * engine.state.weight).backward()
        autoencoder_optimizer.step()

        scores = classifier(code.detach())
        classifier_loss = F.cross_entropy(scores, labels)
        classifier_optimizer.zero_grad()
        (classifier_loss * engine.state.weight).backward()
        classifier_optimizer.step()
        return {
            "reconstruction_loss": reconstruction_loss.detach(),
            "classifier_loss": classifier_loss.detach(),
            "accuracy": (scores.argmax(1) == labels).float().mean(),
        }

    trainer = Engine(train_step)
    sums: dict[str, torch.Tensor] = {}

    @trainer.on(Events.EPOCH_STARTED)
    def reset() -> None:
        sums.clear()

    @trainer.on(Events.ITERATION_COMPLETED)
    def add(engine: Engine) -> None:
        for name, value in engine.state.output.items():
            sums[name] = sums.get(name, 0) + value

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine: Engine) -> None:
        length = engine.state.epoch_length
        engine.state.metrics = {name: world.all_reduce(float(v) / length, op="mean") for name, v in sums.items()}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in engine.state.metrics.items())
        world.print(f"epoch {engine.state.epoch:2d}: {shown}")

    return trainer.run(loader, max_epochs=epochs).metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    with allstep.init() as world:
        main(world, parser.parse_args().epochs)
