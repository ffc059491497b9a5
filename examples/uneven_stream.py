"""Train on a stream whose shards differ by a factor of three and whose length nobody knows.

    allstep run --nproc 3 examples/uneven_stream.py --uneven longest
    allstep run --nproc 3 examples/uneven_stream.py --plain

There are three shards of 90, 190 and 270 samples, as logs of three machines might be; with three ranks each has one.
The data set cannot tell its length: a rank learns that it is out of data when it asks for the next batch. With --uneven
shortest an epoch ends for all when the first rank is out of data, with longest when the last one is, and with error
that is an error. --plain runs the same data through an ordinary loop around DDP, in which ranks do not agree: it pairs
gradients of different epochs, and then fails or waits until --timeout.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import allstep
from allstep import Engine, Events

SHARDS = (90, 190, 270)
Sample = tuple[torch.Tensor, torch.Tensor]


class Stream(IterableDataset[Sample]):
    """This rank's shards, one after the other: x in [-3, 3], y = sin(x) and some noise. It has no length."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.shards = range(rank, len(SHARDS), world_size)

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.shards:
            noise = torch.Generator().manual_seed(shard)
            for _ in range(SHARDS[shard]):
                x = torch.rand(1, generator=noise) * 6 - 3
                yield x, torch.sin(x) + 0.1 * torch.randn(1, generator=noise)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))


def held_out_loss(model: nn.Module) -> float:
    """Mean squared error against the sine itself."""
    x = torch.linspace(-3, 3, 200, device=next(model.parameters()).device).unsqueeze(1)
    with torch.no_grad():
        return F.mse_loss(model(x), torch.sin(x)).item()


def train(world: allstep.World, options: argparse.Namespace) -> dict[str, object]:
    """Train with allstep; returns what each rank took part with."""
    world.seed_everything(1)
    model = world.wrap(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loader = DataLoader(Stream(world.rank, world.world_size), batch_size=16)
    taken = {"batches": 0, "samples": 0, "iterations without a batch": 0}

    def train_step(engine: Engine, batch: object) -> torch.Tensor:
        x, y = world.to_device(batch)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        (loss * engine.state.weight).backward()
        optimizer.step()
        return loss.detach()

    trainer = Engine(train_step)

    @trainer.on(Events.ITERATION_COMPLETED)
    def count(engine: Engine) -> None:
        state = engine.state
        if state.active:
            taken["batches"] += 1
            taken["samples"] += len(state.batch[0])
        else:
            taken["iterations without a batch"] += 1

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine: Engine) -> None:
        loss = held_out_loss(world.unwrap(model))
        world.print(f"epoch {engine.state.epoch}: {engine.state.epoch_length} iterations, loss {loss:.4f}")

    state = trainer.run(loader, max_epochs=options.epochs, uneven=options.uneven)
    left = {unread.rank: f"{unread.batches} batches of {unread.samples} samples" for unread in state.unread}
    ranks = world.gather_objects(taken)
    for rank, each in enumerate(ranks):
        world.print(
            f"rank {rank}: trained {each['samples']} samples in {each['batches']} batches, "
            f"{each['iterations without a batch']} iterations without one; "
            f"unread when the last epoch ended, as far as read ahead: {left.get(rank, 'nothing')}"
        )
    return {"iterations": state.iteration, "epochs": state.epoch, "ranks": ranks, "unread": left}


def train_plainly(world: allstep.World, options: argparse.Namespace) -> None:
    """The same data in an ordinary loop, which supposes that all ranks have equally many batches."""
    world.seed_everything(1)
    model = world.wrap(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loader = DataLoader(Stream(world.rank, world.world_size), batch_size=16)
    for epoch in range(options.epochs):
        for at, batch in enumerate(loader):
            x, y = world.to_device(batch)
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"rank {world.rank}: epoch {epoch + 1}, batch {at + 1}", flush=True)
    print(f"rank {world.rank}: done with its data, and waits for the others", flush=True)
    world.barrier()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--uneven", choices=("shortest", "longest", "error"), default="shortest")
    parser.add_argument("--plain", action="store_true", help="an ordinary loop around DDP, in which ranks do not agree")
    parser.add_argument("--timeout", type=float, default=15.0, help="seconds a rank waits for the others")
    parser.add_argument("--out", type=Path, help="file to write the counts to, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    with allstep.init(timeout=options.timeout) as world:
        if options.plain:
            train_plainly(world, options)
        else:
            counts = train(world, options)
            if options.out is not None and world.is_main:
                options.out.write_text(json.dumps(counts))
