"""Samples and tokens a second over ranks, floating-point operations, and what a checkpoint keeps of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from allstep import Alone, Checkpoint, Engine, Events, Throughput
from allstep.handlers.rates import peak_flops
from allstep.testing import SimulatedRank, run_ranks, simulate
from allstep.world import World
from tests.engine.recording import nothing


class Clock:
    """Time that goes by a second a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self, engine: Engine, batch: object) -> None:
        self.now += 1


def test_an_epochs_rate_is_its_samples_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    trainer = Engine(clock.step, coordinator=Alone())
    throughput = Throughput().attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:  # no part of the epoch's time
        clock.now += 100

    rates = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: rates.append(trainer.state.metrics["samples/s"]))
    trainer.run([torch.zeros(6), torch.zeros(6), torch.zeros(3)], max_epochs=2)
    assert rates == [5.0, 5.0]
    assert throughput.total == 30


def test_a_function_counts_tokens_before_the_step_changes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def step(engine: Engine, batch: list[int]) -> None:
        clock.step(engine, batch)
        batch.clear()

    trainer = Engine(step, coordinator=Alone())
    Throughput(len, unit="tokens").attach(trainer)
    assert trainer.run([[1, 2, 3], [4]]).metrics == {"tokens/s": 2.0}


def test_every_so_many_iterations_the_rate_is_of_those(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Engine(Clock(monkeypatch).step, coordinator=Alone())
    Throughput(len, every=2).attach(trainer)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: seen.append(trainer.state.metrics.copy()))
    trainer.run([[0], [0], [0] * 5, [0] * 3])
    assert seen == [{"samples/s": 1.0}, {"samples/s": 4.0}]


def test_torch_counts_the_operations_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = nn.Linear(10, 20)
    modes: list[int] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        clock.step(engine, batch)
        model(batch).sum().backward()
        modes.append(len(_get_current_dispatch_mode_stack()))

    trainer = Engine(step, coordinator=Alone())
    throughput = Throughput(flops=True, peak=3200.0).attach(trainer)
    trainer.run([torch.randn(4, 10)] * 3, max_epochs=2)
    # Forward and the gradient of the weight, two operations for each multiplication; the input has no gradient.
    assert throughput.flops_per_unit == 2 * 2 * 10 * 20
    assert modes == [1, 0, 0, 0, 0, 0]


def test_operations_a_second_are_compared_with_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Engine(Clock(monkeypatch).step, coordinator=Alone())
    Throughput(len, flops=1e12, peak=8e12).attach(trainer)
    metrics = trainer.run([[0] * 4] * 3).metrics
    assert metrics == {"samples/s": 4.0, "TFLOP/s": 4.0, "MFU": 0.5}


def test_a_step_that_fails_ends_the_counting_of_operations() -> None:
    def step(engine: Engine, batch: torch.Tensor) -> None:
        raise OSError("no disk")

    trainer = Engine(step, coordinator=Alone())
    Throughput(flops=True).attach(trainer)
    with pytest.raises(OSError, match="no disk"):
        trainer.run([torch.zeros(2)])
    assert not _get_current_dispatch_mode_stack()


def test_a_step_without_countable_operations_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Engine(nothing, coordinator=Alone())
    Throughput(len, flops=True).attach(trainer)
    trainer.run([[0], [0]], max_epochs=2)
    assert caplog.text.count("no floating-point operation was counted in iteration") == 1


def _uneven(coordinator: SimulatedRank) -> tuple[int, dict[str, float]]:
    trainer = Engine(nothing, coordinator=coordinator, name="trainer", idle="skip")
    throughput = Throughput().attach(trainer)
    data = [torch.zeros(4)] * (3 + coordinator.rank)
    trainer.run(data, max_epochs=2, uneven="longest")
    return throughput.total, trainer.state.metrics


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_sample_of_each_rank_counts_once_and_ranks_agree(ranks: int) -> None:
    results = simulate(_uneven, ranks)
    assert results[0][0] == 2 * 4 * sum(3 + rank for rank in range(ranks))
    assert results == [results[0]] * ranks
    assert results[0][1]["samples/s"] > 0


def _counted(world: World, folder: str, at: int | None) -> tuple[int, dict[str, Any]]:
    trainer = Engine(lambda engine, batch: None)
    throughput = Throughput(len, unit="tokens").attach(trainer)
    objects = {"trainer": trainer, "throughput": throughput}
    checkpoint = Checkpoint(folder, objects, every=2, keep_last=None).attach(trainer)
    checkpoint.resume()
    if at is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=at), lambda: trainer.terminate())
    trainer.run([[0] * (1 + world.rank)] * 6, max_epochs=2, window=1)
    return throughput.total, trainer.state.metrics


@pytest.mark.slow
def test_a_resumed_run_has_counted_as_much_as_an_unbroken_one(tmp_path: Path) -> None:
    whole = run_ranks(_counted, 2, str(tmp_path / "whole"), None)
    run_ranks(_counted, 2, str(tmp_path / "broken"), 7)
    resumed = run_ranks(_counted, 2, str(tmp_path / "broken"), None)
    assert [each[0] for each in whole] == [each[0] for each in resumed] == [36, 36]
    assert resumed[0] == resumed[1]


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA GB200", 2500),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops("Some GPU 9000") is None


@pytest.mark.parametrize(
    ("options", "text"), [({"every": 0}, "every is 0"), ({"peak": 0}, "peak is 0"), ({"count": 3}, "count is 3")]
)
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        Throughput(**options)


def _operations_in_ddp(world: World) -> tuple[float | None, dict[str, Any]]:
    model = world.wrap(nn.Linear(100, 20))

    def step(engine: Engine, batch: torch.Tensor) -> None:
        (model(batch).sum() * engine.state.weight).backward()

    trainer = Engine(step)
    throughput = Throughput(flops=True, peak=1e9).attach(trainer)
    # The first rank's batches are smaller, which changes nothing for one sample.
    trainer.run([torch.randn(2 + 2 * world.rank, 100)] * 4, max_epochs=2)
    return throughput.flops_per_unit, trainer.state.metrics


@pytest.mark.slow
def test_operations_of_a_wrapped_model_are_those_of_all_ranks() -> None:
    (first, metrics), (second, others) = run_ranks(_operations_in_ddp, 2)
    assert first == second == 2 * 2 * 100 * 20
    assert metrics == others
    assert metrics["TFLOP/s"] * 1e12 == pytest.approx(metrics["samples/s"] * 8000)
    assert metrics["MFU"] == pytest.approx(metrics["TFLOP/s"] * 1e12 / 2e9)
