"""A small training script, right or wrong in one way that its argument names."""

import argparse
import os
import random

import torch
from torch import nn
from torch.utils.data import Dataset

import allstep
from allstep import Checkpoint, Engine, Events, Preemption

parser = argparse.ArgumentParser()
parser.add_argument("--wrong", default="")
parser.add_argument("--every", default="epoch")
parser.add_argument("--epochs", type=int, default=5000)
parser.add_argument("--per-rank", action="store_true")
args = parser.parse_args()


class Points(Dataset):
    def __init__(self):
        self.taken = 0

    def __len__(self):
        return 96

    def __getitem__(self, index):
        self.taken += 1
        x = torch.arange(8) * 0.1 + index / 96
        if args.wrong == "counts":
            x = x + self.taken / 1000
        return x, torch.tensor([index % 7 / 7])


with allstep.init(seed=3) as world:
    if args.wrong == "unseeded":
        torch.manual_seed(int.from_bytes(os.urandom(4)))
    dropout = nn.Identity() if args.wrong == "per-size" else nn.Dropout(0.2)
    model = world.wrap(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), dropout, nn.Linear(16, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 0.95**steps)
    noise = torch.Generator().manual_seed(5)
    if args.per_rank:
        loader = world.loader(Points(), global_batch_size=4 * world.world_size, shuffle=True)
    else:
        loader = world.loader(Points(), global_batch_size=8, shuffle=True)

    def step(engine, batch):
        x, y = world.to_device(batch)
        if args.wrong in ("generator", "generator-kept"):
            x = x + 0.01 * torch.randn(8, generator=noise)
        if args.wrong == "chance":
            x = x + 0.01 * random.SystemRandom().random()
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        (loss * engine.state.weight).backward()
        optimizer.step()
        return loss.detach()

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
    left_out = {"optimizer": [optimizer], "scheduler": [scheduler], "generator": [noise]}.get(args.wrong, [])
    folder = f"saved-{os.environ['ALLSTEP_LAUNCH']}" if args.wrong == "moves" else "saved"
    every = int(args.every) if args.every.isdecimal() else args.every
    if args.wrong != "no-checkpoint":
        checkpoint = Checkpoint(folder, every=every, leave_out=left_out).attach(trainer)
        resumed = None if args.wrong == "no-resume" else checkpoint.resume()
        if args.wrong == "crash" and resumed is not None:
            raise ValueError("not a second time")
        if args.wrong == "weights":
            with torch.no_grad():
                model.get_parameter("module.0.weight" if world.world_size > 1 else "0.weight").fill_(0.1)
        if args.wrong == "rate":
            optimizer.param_groups[0]["lr"] = 0.01
    if args.wrong != "no-preemption":
        Preemption().attach(trainer)
    trainer.run(loader, max_epochs=args.epochs)
    if args.epochs > 10:
        raise AssertionError("a rehearsed script ends with its iterations")
