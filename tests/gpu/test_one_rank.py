"""One rank on one GPU: groups, steps that do not wait, their time, and memory that copies run into."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import allstep
from allstep import cuda
from allstep.cuda import HostMemory
from allstep.engine import Engine, Events
from allstep.metrics import Mean, Metrics
from allstep.trainers import create_supervised_trainer
from tests.gpu.training import is_last, plain

pytestmark = pytest.mark.slow

Figure = Callable[[str, float, str], None]


def test_a_group_of_one_rank_is_bound_and_stands_beside_gloo(device, figure: Figure):
    with allstep.init(device=str(device), mesh={"replicate": 1}) as world:
        assert world.backend == ("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            assert dist.group.WORLD is not None
            assert dist.group.WORLD.bound_device_id == world.device
        on_device, on_host = torch.ones(4, device=world.device), torch.ones(4)
        dist.all_reduce(on_device)
        dist.all_reduce(on_host, group=dist.new_group(backend="gloo"))
        assert on_device.tolist() == on_host.tolist() == [1.0] * 4
        assert world.all_reduce(2) == 2
        assert world.gather_objects({"rank": 0}) == [{"rank": 0}]
        world.barrier()
        began = time.monotonic()
    figure("close", time.monotonic() - began, "s")
    assert time.monotonic() - began < 30


def test_no_iteration_waits_for_the_device(device):
    """torch raises where the host waits, from an iteration's start to its end."""
    model = plain(device, 64, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    data = [(torch.randn(8, 64), torch.randn(8, 64)) for _ in range(6)]
    if device.type == "cuda":
        data = [(x.pin_memory(), y.pin_memory()) for x, y in data]
    with allstep.init(device=str(device)):
        trainer = create_supervised_trainer(model, optimizer, nn.functional.mse_loss, clip_norm=1.0)
        Metrics({"loss": Mean()}).attach(trainer)

        def watch(mode: str) -> None:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode(mode)

        # In the second epoch, when CUDA and cuBLAS have made what they make once.
        trainer.add_event_handler(Events.ITERATION_STARTED(after=6), lambda engine: watch("error"))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: watch("default") if is_last(engine) else 0)
        try:
            trainer.run(data, max_epochs=2)
        finally:
            watch("default")
        assert trainer.state.iteration == 12


def replayed(device: torch.device) -> Callable[[], None]:
    """A training step of a model as one CUDA graph; on the CPU the step itself."""
    model = plain(device, 2048 if device.type == "cuda" else 64, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(512 if device.type == "cuda" else 8, model[0].in_features, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(device: torch.device, call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def test_an_iteration_takes_no_longer_than_that_of_a_bare_loop(device, figure: Figure):
    replay = replayed(device)
    rounds, iterations = (7, 400) if device.type == "cuda" else (1, 3)

    def bare() -> None:
        for _ in range(iterations):
            replay()

    def engine() -> None:
        Engine(lambda engine, batch: replay()).run(range(iterations))

    bare(), engine()
    ratios = [seconds(device, engine) / seconds(device, bare) for _ in range(rounds)]
    figure("iteration", 1e3 * seconds(device, bare) / iterations, "ms")
    figure("ratio", statistics.median(ratios), "")
    if device.type == "cuda":  # on the CPU only that it runs
        assert statistics.median(ratios) <= 1.01


def test_registered_memory_takes_copies_and_is_given_back(device):
    size = 8_000_003  # no power of two
    memory = HostMemory(size, pinned=device.type == "cuda")
    assert memory.pinned == memory.bytes.is_pinned() == (device.type == "cuda")
    values = torch.arange(1_000_000, dtype=torch.float64, device=device)
    memory.bytes[:8_000_000].view(torch.float64).copy_(values, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(memory.bytes[:8_000_000].view(torch.float64), values.cpu())
    del memory
    values.add_(1)  # CUDA has no error left over
    if device.type == "cuda":
        torch.cuda.synchronize()


def test_memory_that_the_driver_refuses_leaves_no_error_behind(device, caplog):
    first = HostMemory(1 << 20, pinned=device.type == "cuda")
    if device.type == "cuda":
        assert not cuda._register(first.bytes, 1 << 30)  # it is registered already
        assert "cannot be pinned" in caplog.text
    values = torch.ones(8, device=device) + 1
    assert values.sum().item() == 16
