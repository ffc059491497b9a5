"""What `world.plan` says of a step's memory, against what the step takes: the peak of allocations on the CPU.

Models of a few megabytes are trained for two steps under torch's profiler, which is told of each
allocation, from before the model is built: once over a group whose collectives do nothing, and once over gloo. Gloo
copies what it reduces and keeps tensors until its threads let go of them, which is in no plan. Each line is rank 0's;
a ratio is planned over measured.

    python benchmarks/plan.py [--only transformer]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import allstep
from allstep.parallel import wrap_module
from allstep.planning.torch_private import fake_ranks
from allstep.testing import run_ranks

from machine import machine_line

WIDTH, LAYERS, LETTERS = 256, 4, 512


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = Perceptron()

    def forward(self, x: torch.Tensor) -> Any:
        rows, tokens, _ = x.shape
        q, k, v = self.query_key_value(self.first(x)).view(rows, tokens, 3, 4, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, tokens, WIDTH))
        return self.perceptron(self.second(x))


def perceptron() -> nn.Module:
    return nn.Sequential(*[Perceptron() for _ in range(LAYERS)], nn.Linear(WIDTH, LETTERS))


def transformer() -> nn.Module:
    blocks = [Block() for _ in range(LAYERS)]
    return nn.Sequential(nn.Embedding(LETTERS, WIDTH), *blocks, nn.Linear(WIDTH, LETTERS))


def step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def batch_for(model: str) -> tuple[torch.Tensor, torch.Tensor]:
    if model == "perceptron":
        return torch.randn(1024, WIDTH), torch.randint(LETTERS, (1024,))
    return torch.randint(LETTERS, (8, 128)), torch.randint(LETTERS, (8, 128))


MODELS = {"perceptron": (perceptron, Perceptron), "transformer": (transformer, Block)}


def train(model: Any, name: str, accumulate: int) -> None:
    """Two optimizer steps."""
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        for part in range(accumulate):
            batch = batch_for(name)
            is_last = part == accumulate - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(is_last)
            if hasattr(model, "require_backward_grad_sync"):
                model.require_backward_grad_sync = is_last
            step(model, batch).backward()
            del batch
        optimizer.step()
        optimizer.zero_grad()


def measured(world: allstep.World, name: str, options: Mapping[str, Any], accumulate: int) -> int:
    """The most bytes that each rank allocated, gloo's among them."""
    with allocations() as peak:
        train(world.wrap(MODELS[name][0](), **options), name, accumulate)
    return peak[0]


def planned_and_measured_alone(
    world: allstep.World,
    name: str,
    ranks: int,
    mesh: dict[str, int] | None,
    options: Mapping[str, Any],
    accumulate: int,
) -> tuple[int, int | None]:
    """The plan's peak, and the most bytes that were allocated over a group whose collectives do nothing."""
    make = MODELS[name][0]
    plan = world.plan(make(), batch_for(name), step=step, accumulate=accumulate, ranks=ranks, mesh=mesh, **options)
    if ranks > 1 and mesh is None:  # DDP compares what its collectives give
        return plan.peak.total, None
    with fake_ranks(ranks):
        opened = None if mesh is None else init_device_mesh("cpu", (*mesh.values(),), mesh_dim_names=(*mesh,))
        with allocations() as peak:
            train(wrap_module(make(), torch.device("cpu"), ranks, mesh=opened, **options), name, accumulate)
    return plan.peak.total, peak[0]


@contextmanager
def allocations() -> Iterator[list[int]]:
    """The most bytes of the CPU that are allocated at a time in this context, in the list afterwards."""
    found: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    found.append(max(each["args"]["Total Allocated"] for each in events if each["name"] == "[memory]"))


UNIT = "unit"
TRAININGS: dict[str, tuple[int, dict[str, int] | None, dict[str, Any], int]] = {
    "one rank": (1, None, {}, 1),
    "one rank, anew": (1, None, {"checkpoint_activations": UNIT}, 1),
    "DDP": (2, None, {}, 1),
    "DDP, 2 batches a step": (2, None, {}, 2),
    "shard=2": (2, {"shard": 2}, {"units": UNIT}, 1),
    "shard=2, anew": (2, {"shard": 2}, {"units": UNIT, "checkpoint_activations": UNIT}, 1),
    "shard=2, kept": (2, {"shard": 2}, {"units": UNIT, "reshard_after_forward": False}, 1),
    "shard=2, bf16": (2, {"shard": 2}, {"units": UNIT, "precision": "bf16"}, 1),
    "shard=2, 2 batches a step": (2, {"shard": 2}, {"units": UNIT}, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    only = parser.parse_args().only
    print(machine_line())
    print(f"{'model':<12} {'training':<26} {'planned':>9} {'measured':>10} {'ratio':>6} {'over gloo':>10} {'ratio':>6}")
    for name in MODELS if only is None else [only]:
        for training, (ranks, mesh, options, accumulate) in TRAININGS.items():
            options = {key: MODELS[name][1] if value == UNIT else value for key, value in options.items()}
            env = {} if mesh is None else {"ALLSTEP_MESH": "shard=2"}
            alone = run_ranks(planned_and_measured_alone, 1, name, ranks, mesh, options, accumulate, timeout=300)[0]
            over_gloo = run_ranks(measured, ranks, name, options, accumulate, env=env, timeout=300)[0]
            cells = [f"{alone[0] / 1e6:>6.1f} MB"]
            cells += [
                f"{'':>17}" if peak is None else f"{peak / 1e6:>7.1f} MB {alone[0] / peak:>6.3f}"
                for peak in (alone[1], over_gloo)
            ]
            print(f"{name:<12} {training:<26} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
