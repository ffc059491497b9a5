"""A small model with its optimizer on ranks of any mesh, saved and loaded, for tests to compare by hash."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from allstep import Checkpoint, Engine
from allstep.world import World

MESHES = {
    "ddp1": (1, ""),
    "ddp2": (2, ""),
    "ddp4": (4, ""),
    "fsdp2": (2, "shard=2"),
    "fsdp3": (3, "shard=3"),
    "fsdp4": (4, "shard=4"),
    "hsdp4": (4, "replicate=2,shard=2"),
    "tp2": (2, "tensor=2"),
    "tp_fsdp4": (4, "shard=2,tensor=2"),
}
"""Ranks and ALLSTEP_MESH of each way to lay a model out."""


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Tied weights, a frozen parameter, buffers, and sizes that divide by no number of ranks."""

    def __init__(self, width: int = 5, hidden: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(2)])
        self.blocks[1].norm.bias.requires_grad_(False)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale[0]


def laid_out(world: World, model: nn.Module, **how: Any) -> nn.Module:
    """The model as the World's mesh has it."""
    plan = {f"blocks.{at}.{name}": style for at in range(2) for name, style in (("up", "colwise"), ("down", "rowwise"))}
    return world.wrap(model, units=Block, tensor_plan=plan, **how)


def sgd_adam(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() < 2 and each.requires_grad]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "lr": 0.01, "weight_decay": 0.0}], lr=0.02)


def digest(value: Any) -> str:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return hashlib.sha256(
        whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()[:16]


def digests(world: World, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Hashes of the whole parameters, buffers and states of the optimizer, the latter by the parameter's name."""
    plain = world.unwrap(model)
    found = {name: digest(value) for name, value in plain.state_dict().items()}
    names = {id(each): name for name, each in plain.named_parameters()}
    for parameter, states in optimizer.state.items():
        found |= {f"{names[id(parameter)]}/{key}": digest(value) for key, value in states.items()}
    return found


def trained_and_saved(world: World, folder: str, seed: int) -> dict[str, str]:
    """Two steps from seeded weights, saved; every rank is given the same data."""
    torch.manual_seed(seed)
    model = laid_out(world, Net())
    optimizer = sgd_adam(model)
    for step in range(2):
        tokens = torch.arange(6).reshape(2, 3) + step % 2
        nn.functional.cross_entropy(model(tokens).transpose(1, 2), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = Checkpoint(folder, {"model": model, "optimizer": optimizer}, every=None, strict=True)
    checkpoint.save(Engine(lambda engine, batch: None), wait=True)
    return digests(world, model, optimizer)


def saved_elements(folder: str) -> int:
    """Elements in all files of the one checkpoint in a folder, of the model and of the optimizer."""
    files = list(Path(folder).glob("save-*/rank_*.safetensors"))
    assert files
    found = 0
    for each in files:
        with safe_open(each, "pt") as opened:
            found += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys() if key[0] != "~")  # noqa: SIM118
    return found


def loaded(world: World, folders: list[str]) -> list[dict[str, str]]:
    """What a new model and optimizer are after they have resumed from each folder."""
    found = []
    for seed, folder in enumerate(folders):
        torch.manual_seed(1000 + seed)
        model = laid_out(world, Net())
        optimizer = sgd_adam(model)
        Checkpoint(f"{folder}-next", {"model": model, "optimizer": optimizer}, every=None).resume(folder)
        found.append(digests(world, model, optimizer))
    return found
