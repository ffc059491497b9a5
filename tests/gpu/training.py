"""A small training run with what is special on a GPU: fused kernels, memory formats, half precision, its generator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from allstep.checkpoint import Checkpoint
from allstep.engine import Engine, Events
from allstep.trainers import create_supervised_trainer
from allstep.world import World


def convolutional(device: torch.device) -> nn.Module:
    """A model with dropout, whose weights lie channels last."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(10)
    )
    model(torch.zeros(2, 3, 8, 8))
    return model.to(device, memory_format=torch.channels_last)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Always the same images and labels."""
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(8, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last),
            torch.randint(10, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def trained(world: World, folder: Path, epochs: int) -> tuple[dict[str, torch.Tensor], Engine]:
    """The parameters after some epochs, begun or gone on with from a folder of checkpoints."""
    world.seed_everything(3)
    model = world.wrap(convolutional(world.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    half = world.device.type == "cuda"
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, precision="fp16" if half else "no", clip_norm=1.0
    )
    checkpoint = Checkpoint(folder, every="epoch").attach(trainer)
    checkpoint.resume()
    trainer.run(batches(4), max_epochs=epochs)
    checkpoint.store.wait()
    return {name: value.detach().cpu().clone() for name, value in world.unwrap(model).state_dict().items()}, trainer


def plain(device: torch.device, width: int, depth: int) -> nn.Module:
    """Layers that take the device some time."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).to(device)


def is_last(engine: Engine) -> bool:
    """Whether the iteration is the last of its epoch."""
    return engine.state.iteration % int(engine.state.epoch_length or 1) == 0


__all__ = ["Events", "batches", "convolutional", "is_last", "plain", "trained"]
