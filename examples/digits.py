"""Train a small convolutional network on the 1,797 handwritten digits that scikit-learn ships.

    python examples/digits.py
    allstep run --nproc 2 examples/digits.py
    torchrun --nproc-per-node 2 examples/digits.py
    srun --ntasks 2 python examples/digits.py

Each epoch trains over all ranks and evaluates over all ranks: every test sample counts once, whatever their number.
Metrics are printed and, with --out, written as one JSON object a line; --save keeps the trained weights, and --evaluate
computes the test accuracy of saved weights without training. With --checkpoints a run that was killed or preempted goes
on where it was when it is started again, on as many ranks as it then has.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import allstep
from allstep import Checkpoint, Engine, Events, Metrics, Preemption

TEST_SIZE = 360


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Train and test sets: images (1, 8, 8) in [0, 1], labels 0 to 9; the same split on every rank."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_SIZE], order[TEST_SIZE:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def network() -> nn.Module:
    """A small convolutional network for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def main(world: allstep.World, options: argparse.Namespace) -> float:
    """Train and evaluate; returns the last test accuracy, the same on all ranks."""
    world.seed_everything(options.seed)
    train_set, test_set = digits()
    model = world.wrap(network())
    if options.evaluate is not None:
        world.unwrap(model).load_state_dict(torch.load(options.evaluate, weights_only=True, map_location=world.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    train_loader = world.loader(train_set, global_batch_size=64, shuffle=True)
    test_loader = world.loader(test_set, global_batch_size=180)

    def train_step(engine: Engine, batch: object) -> torch.Tensor:
        x, y = world.to_device(batch)
        model.train()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss * engine.state.weight).backward()
        optimizer.step()
        return loss.detach()

    trainer, evaluator = Engine(train_step), allstep.create_supervised_evaluator(model)
    # Computed at the run's end, so that an evaluation cut short by a second signal counts what it has seen.
    Metrics({"accuracy": MulticlassAccuracy(10, average="micro")}).attach(evaluator, usage="run")

    def evaluate() -> float:
        return float(evaluator.run(test_loader).metrics["accuracy"])

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine: Engine) -> None:
        # None where a resumed run had only the epoch's end left to do.
        last = float("nan") if engine.state.output is None else float(engine.state.output)
        loss = world.all_reduce(last, op="mean")
        engine.state.metrics = {"epoch": engine.state.epoch, "loss": loss, "test_accuracy": evaluate()}
        took = time.perf_counter() - began
        world.print(
            f"epoch {engine.state.epoch:2d}: loss of the last batch {loss:.4f}, "
            f"test accuracy {engine.state.metrics['test_accuracy']:.4f}, {took:.1f} s"
        )
        if options.out is not None and world.is_main:
            with options.out.open("a") as file:
                print(json.dumps(engine.state.metrics), file=file)

    if options.checkpoints is not None:
        objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
        every = options.checkpoint_every
        Checkpoint(options.checkpoints, objects, every=every).attach(trainer).resume()
        Preemption(hurries=[evaluator]).attach(trainer)
    began = time.perf_counter()
    world.print(f"{world.world_size} rank(s) on {world.device.type}, {len(train_set)} training samples")
    if options.evaluate is None:
        trainer.run(train_loader, max_epochs=options.epochs)
        accuracy = trainer.state.metrics["test_accuracy"]
    else:
        accuracy = evaluate()
    if options.save is not None and world.is_main:
        torch.save(world.unwrap(model).state_dict(), options.save)
    world.print(f"test accuracy {accuracy!r} on {TEST_SIZE} samples")
    return accuracy


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file to append each epoch's metrics to, as JSON lines")
    parser.add_argument("--save", type=Path, help="file to save the trained weights to")
    parser.add_argument("--checkpoints", type=Path, help="folder to save checkpoints to and to resume from")
    parser.add_argument("--checkpoint-every", default="epoch", help="such as epoch, '50 iterations' or '10 minutes'")
    parser.add_argument("--evaluate", type=Path, help="evaluate these weights instead of training")
    return parser.parse_args()


if __name__ == "__main__":
    with allstep.init() as world:
        main(world, parse())
