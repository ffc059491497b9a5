"""Models of known sizes, and the memory that a real step of them takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.relu(self.up(x)))


def blocks(count: int = 3, width: int = 256) -> nn.Sequential:
    """Of 8 * width**2 parameters each, and none beside."""
    return nn.Sequential(*[Block(width) for _ in range(count)])


@contextmanager
def allocations(folder: Path) -> Iterator[list[int]]:
    """The most bytes of the CPU that are allocated at a time in this context, in the list afterwards."""
    found: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    # By address, for the profiler's own total goes on from one use to the next.
    held: dict[int, int] = {}
    most = [0]
    for each in sorted((one for one in events if one["name"] == "[memory]"), key=lambda one: one["ts"]):
        size, address = each["args"]["Bytes"], each["args"]["Addr"]
        held.update({address: size} if size > 0 else {address: 0})
        most.append(max(most[-1], sum(held.values())))
    found.append(most[-1])


def train(model: nn.Module, batch_size: int) -> None:
    """Two optimizer steps, after which every later one is like the second."""
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(batch_size, 256)).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
