"""A generative adversarial network on scikit-learn's handwritten digits: two models, two optimizers, one step.

    allstep run --nproc 2 examples/gan.py --grid samples.png

A generator learns to draw digits of 8 x 8 pixels that a discriminator cannot tell from real ones. After each epoch the
Fréchet distance and the inception score of its drawings are computed over all ranks. Both need features of images:
where others take Inception, a small classifier is trained here first, since Inception has never seen such images. At
the end rank 0 writes a grid of drawings as a PNG file.
"""

from __future__ import annotations

import argparse
import struct
import warnings
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.image.inception import InceptionScore

import allstep
from allstep import Engine, Events, Mean, Metrics
from allstep.metrics import FrechetDistance

from digits import digits

NOISE, FEATURES = 32, 32


def generator_network() -> nn.Module:
    """Noise (N, 32) to images (N, 1, 8, 8) in [0, 1]."""
    return nn.Sequential(
        nn.Linear(NOISE, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 64),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, 8, 8)),
    )


def discriminator_network() -> nn.Module:
    """Images (N, 1, 8, 8) to scores (N, 1), positive for real ones."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(256, 128),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(128, 1),
    )


def train_classifier(world: allstep.World, epochs: int) -> tuple[nn.Module, nn.Module, float]:
    """Learn to read digits; returns what makes features (N, 32), what makes logits (N, 10), and the test accuracy."""
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, FEATURES), nn.ReLU()
    )
    logits = nn.Sequential(features, nn.Linear(FEATURES, 10))
    model = world.wrap(logits)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train_set, test_set = digits()
    trainer = allstep.create_supervised_trainer(model, optimizer, F.cross_entropy)
    trainer.run(world.loader(train_set, global_batch_size=64, shuffle=True), max_epochs=epochs)
    evaluator = allstep.create_supervised_evaluator(model)
    Metrics({"accuracy": MulticlassAccuracy(10, average="micro")}).attach(evaluator)
    state = evaluator.run(world.loader(test_set, global_batch_size=180))
    logits.requires_grad_(False).eval()  # the inception score runs it in the mode that it is in
    return features, logits, float(state.metrics["accuracy"])


def make_trainer(world: allstep.World, generator: nn.Module, discriminator: nn.Module) -> Engine:
    """One step trains the discriminator, then the generator; its output is the dictionary of both losses."""
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    judge = world.unwrap(discriminator)

    def train_step(engine: Engine, batch: object) -> dict[str, torch.Tensor]:
        real, _ = world.to_device(batch)
        ones, zeros = torch.ones(len(real), 1, device=world.device), torch.zeros(len(real), 1, device=world.device)
        fake = generator(torch.randn(len(real), NOISE, device=world.device))

        scores = discriminator(torch.cat([real, fake.detach()]))
        discriminator_loss = F.binary_cross_entropy_with_logits(scores, torch.cat([ones * 0.9, zeros]))
        discriminator_optimizer.zero_grad()
        (discriminator_loss * engine.state.weight).backward()
        discriminator_optimizer.step()

        judge.requires_grad_(False)  # the gradient passes through it and is not for it
        generator_loss = F.binary_cross_entropy_with_logits(judge(fake), ones)
        generator_optimizer.zero_grad()
        (generator_loss * engine.state.weight).backward()
        generator_optimizer.step()
        judge.requires_grad_(True)
        return {"generator": generator_loss.detach(), "discriminator": discriminator_loss.detach()}

    trainer = Engine(train_step)
    names = ("generator", "discriminator")
    Metrics({name: Mean() for name in names}).attach(trainer, {name: lambda o, name=name: o[name] for name in names})
    return trainer


def make_evaluator(world: allstep.World, generator: nn.Module, features: nn.Module, logits: nn.Module) -> Engine:
    """Draws as many images as there are real ones, on each rank its part, and compares them."""
    draw = world.unwrap(generator)

    @torch.no_grad()
    def evaluate_step(engine: Engine, batch: object) -> dict[str, torch.Tensor]:
        real, _ = world.to_device(batch)
        draw.eval()
        seeded = torch.Generator().manual_seed(1000 * world.rank + engine.state.iteration)
        fake = draw(torch.randn(len(real), NOISE, generator=seeded).to(world.device))
        draw.train()
        return {"real": real, "fake": fake}

    evaluator = Engine(evaluate_step, uneven="longest", idle="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the inception score keeps all features, here a few thousand numbers
        score = InceptionScore(logits, splits=4)
    Metrics({"fid": FrechetDistance(features, FEATURES), "inception_score": score}).attach(
        evaluator, {"fid": lambda o: o, "inception_score": lambda o: (o["fake"],)}
    )
    return evaluator


def write_png(path: Path, image: torch.Tensor) -> None:
    """Write a grey image (height, width) in [0, 1]: the smallest PNG file there is, one chunk of compressed rows."""
    height, width = image.shape
    rows = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    data = b"".join(b"\x00" + bytes(row.tolist()) for row in rows)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@torch.no_grad()
def grid(generator: nn.Module, device: torch.device, side: int = 10, zoom: int = 4) -> torch.Tensor:
    """A square of drawings, (height, width) in [0, 1]."""
    generator.eval()
    noise = torch.randn(side * side, NOISE, generator=torch.Generator().manual_seed(0)).to(device)
    images = F.pad(generator(noise).cpu(), (1, 1, 1, 1)).reshape(side, side, 10, 10)
    generator.train()
    flat = images.permute(0, 2, 1, 3).reshape(side * 10, side * 10)
    return flat.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def main(world: allstep.World, options: argparse.Namespace) -> dict[str, float]:
    """Train; returns the last epoch's metrics, the same on all ranks."""
    world.seed_everything(options.seed)
    features, logits, accuracy = train_classifier(world, epochs=8)
    world.print(f"the classifier reads {accuracy:.4f} of the test digits")
    generator, discriminator = world.wrap(generator_network()), world.wrap(discriminator_network())
    world.seed_everything(options.seed, per_rank=True)  # other noise on each rank
    trainer = make_trainer(world, generator, discriminator)
    evaluator = make_evaluator(world, generator, features, logits)
    train_set, _ = digits()
    real = world.loader(train_set, global_batch_size=256)
    metrics: dict[str, float] = {}

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine: Engine) -> None:
        scores = evaluator.run(real).metrics
        spread, _ = scores["inception_score"]
        metrics.update({name: float(engine.state.metrics[name]) for name in ("generator", "discriminator")})
        metrics.update(fid=float(scores["fid"]), inception_score=float(spread))
        shown = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        world.print(f"epoch {engine.state.epoch:2d}: {shown}")

    trainer.run(world.loader(train_set, global_batch_size=64, shuffle=True), max_epochs=options.epochs)
    if options.grid is not None and world.is_main:
        write_png(options.grid, grid(world.unwrap(generator), world.device))
    return metrics


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grid", type=Path, help="PNG file to write drawings to")
    return parser.parse_args()


if __name__ == "__main__":
    with allstep.init() as world:
        main(world, parse())
