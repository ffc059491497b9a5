"""What a run over XLA keeps: checkpoints, generators, outputs; in one process, over the CPU's runtime.

The last test has all others run again in a process with SPMD over four devices, which a process cannot leave.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import allstep
from allstep import Checkpoint, Engine, Events, Gather
from allstep.errors import ParallelError


@pytest.fixture
def world() -> Iterator[allstep.World]:
    with allstep.init(device="xla") as opened:
        yield opened


def data(count: int = 22) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count))


def trainer(world: allstep.World, *, dropout: float = 0.0) -> tuple[Engine, nn.Module, torch.optim.Optimizer]:
    """An engine, its model (two layers of one shape) and its optimizer."""
    world.seed_everything(3)
    model = world.wrap(nn.Sequential(nn.Linear(4, 4), nn.Dropout(dropout), nn.Linear(4, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(engine: Engine, batch: object) -> torch.Tensor:
        x, _ = world.to_device(batch)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        world.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return Engine(step), model, optimizer


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().cpu() for parameter in model.parameters()]


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    def run(folder: Path, epochs: int) -> tuple[list[torch.Tensor], list[float]]:
        with allstep.init(device="xla") as world:
            engine, model, optimizer = trainer(world, dropout=0.5)
            losses: list[torch.Tensor] = []
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
            objects = {"model": model, "optimizer": optimizer, "trainer": engine}
            Checkpoint(folder, objects, every="epoch").attach(engine).resume()
            engine.run(world.loader(data(), batch_size=4, shuffle=True), max_epochs=epochs)
            return values(model), [float(each) for each in losses]

    whole, curve = run(tmp_path / "whole", 4)
    run(tmp_path / "broken", 2)
    resumed, rest = run(tmp_path / "broken", 4)
    assert rest == curve[-len(rest) :]
    assert len(rest) == len(curve) // 2
    assert all(torch.equal(found, expected) for found, expected in zip(resumed, whole, strict=True))


def test_parameters_of_one_shape_are_saved_each(tmp_path):
    def run(*, trains: bool) -> list[torch.Tensor]:
        with allstep.init(device="xla") as world:
            engine, model, _ = trainer(world)
            if not trains:
                for parameter in model.parameters():
                    nn.init.zeros_(parameter)
            Checkpoint(tmp_path, {"model": model, "trainer": engine}, every="epoch").attach(engine).resume()
            if trains:
                engine.run(world.loader(data(), batch_size=4), max_epochs=1)
            return values(model)

    saved, loaded = run(trains=True), run(trains=False)
    assert not torch.equal(saved[0], saved[2])
    assert all(torch.equal(found, expected) for found, expected in zip(loaded, saved, strict=True))


def test_seeds_decide_what_the_device_draws(world):
    def drawn(seed: int) -> torch.Tensor:
        world.seed_everything(seed)
        return torch.rand(8, device=world.device).cpu()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_batches_of_the_loader_are_on_the_device(world):
    batches = list(world.loader(data(), batch_size=4, shuffle=True))
    assert {tensor.device.type for batch in batches for tensor in batch} == {"xla"}
    labels = torch.cat([batch[1].cpu() for batch in batches])
    assert sorted(labels.tolist()) == list(range(22))


def test_outputs_are_gathered_in_the_order_of_the_data(world):
    engine = Engine(lambda engine, batch: {"twice": world.to_device(batch)[1] * 2})
    Gather("twice").attach(engine)
    engine.run(world.loader(data(), batch_size=4, shuffle=True))
    assert engine.state.gathered["twice"].tolist() == [2 * at for at in range(22)]


def test_a_handler_that_reads_outputs_adds_no_graph(world):
    from torch_xla.debug import metrics

    def compiled(*, reads: bool) -> int:
        engine, _, _ = trainer(world)
        if reads:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: float(engine.state.output))
        before = (metrics.metric_data("CompileTime") or (0,))[0]
        engine.run(world.loader(data(), batch_size=4), max_epochs=2)
        return int(metrics.metric_data("CompileTime")[0]) - before

    compiled(reads=False)
    assert compiled(reads=True) == 0


def test_fp16_is_refused(world):
    with pytest.raises(ParallelError, match="bf16"):
        world.wrap(nn.Linear(2, 2), precision="fp16")


@pytest.mark.skipif("XLA_USE_SPMD" in os.environ, reason="this process has SPMD")
def test_all_of_it_holds_over_spmd():
    environ = os.environ | {"XLA_USE_SPMD": "1", "CPU_NUM_DEVICES": "4"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-10_000:]
