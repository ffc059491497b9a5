"""Metrics over real gloo ranks: the number of collectives, exact evaluation, and torchmetrics' own answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import Metric, classification

import allstep
from allstep import Engine, Events
from allstep.metrics import Max, Mean, Metrics, Min, Sum
from allstep.testing import run_ranks
from allstep.world import World
from tests.metrics.counting import begun, counted
from tests.metrics.worlds import Make, all_same_bits, deal, on_one, take

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLASSES = 5


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    sizes = [5, 1, 8, 3, 3, 7, 2]
    return [
        (torch.rand(n, CLASSES, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in sizes
    ]


def ten_of_sums() -> dict[str, Metric]:
    kinds = (
        "Accuracy",
        "Precision",
        "Recall",
        "F1Score",
        "Specificity",
        "ConfusionMatrix",
        "CohenKappa",
        "HammingDistance",
    )
    made = {kind: getattr(classification, f"Multiclass{kind}")(CLASSES) for kind in kinds}
    return {**made, "matthews": classification.MulticlassMatthewsCorrCoef(CLASSES), "loss": Mean()}


def with_curves() -> dict[str, Metric]:
    return {
        **ten_of_sums(),
        "roc": classification.MulticlassROC(CLASSES),
        "ap": classification.MulticlassAveragePrecision(CLASSES),
    }


def transform(batch: Any) -> Any:
    return {"preds": batch[0], "target": batch[1], "value": batch[0].mean(1)}


def epochs(world: World, make: Make, dealt: list[list[Any]], epochs: int = 3) -> tuple[dict[str, Any], list[int]]:
    """Results, and the collectives of each epoch's reduction."""
    engine = Engine(take, uneven="longest", idle="skip")
    counts: list[int] = []
    with counted() as calls:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: counts.append(-calls.total()))
        Metrics(make()).attach(engine, transform)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: counts.append(counts.pop() + calls.total()))
        engine.run(dealt[world.rank], max_epochs=epochs)
    return dict(engine.state.metrics), counts


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_ten_metrics_take_one_collective_and_curves_at_most_two(world_size: int) -> None:
    for make, expected in ((ten_of_sums, [1, 1, 1]), (with_curves, [2, 1, 1])):
        data = batches() * (1 if make is ten_of_sums else 40)
        for empty in (None, 1):
            found = run_ranks(epochs, world_size, make, deal(data, world_size, empty=empty), timeout=150)
            assert [counts for _, counts in found] == [expected] * world_size
            assert all_same_bits([metrics for metrics, _ in found])
            for name, value in on_one(make, data, transform).items():
                torch.testing.assert_close(found[0][0][name], value)


def by_torchmetrics(world: World, dealt: list[list[Any]]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Each metric by allstep, and synchronised by torchmetrics itself, with the collectives that this took."""
    ours, _ = epochs(world, synchronised, dealt, 1)
    metrics = synchronised()
    for batch in dealt[world.rank]:
        for metric in metrics.values():
            metric.update(*batch)
    with counted() as calls:
        theirs = {name: metric.compute() for name, metric in metrics.items()}
    return ours, theirs, calls.total()


def synchronised() -> dict[str, Metric]:
    return {
        "accuracy": classification.MulticlassAccuracy(CLASSES),
        "auroc": classification.MulticlassAUROC(CLASSES),
        "confusion": classification.MulticlassConfusionMatrix(CLASSES),
    }


def test_results_are_torchmetrics_own_in_a_fraction_of_its_collectives() -> None:
    for ours, theirs, calls in run_ranks(by_torchmetrics, 2, deal(batches(), 2), timeout=150):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)
        assert calls > 10


def normalised(world: World) -> nn.Module:
    """A module with buffers, in DDP over several ranks, that has just been trained: DDP broadcasts them when called."""
    torch.manual_seed(0)
    model: nn.Module = world.wrap(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)))
    model(torch.randn(6, 4, generator=torch.Generator().manual_seed(2))).sum().backward()
    return model


def observed_steps(evaluator: Engine) -> list[int]:
    """How many collectives the evaluator's steps will begin, step by step."""
    in_steps: list[int] = []
    evaluator.add_event_handler(Events.ITERATION_STARTED, lambda: in_steps.append(-begun()))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: in_steps.append(in_steps.pop() + begun()))
    return in_steps


def digits(world: World, samples: int) -> dict[str, Any]:
    """A supervised evaluator over a loader whose last batch is short."""
    model = normalised(world)
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    y = torch.arange(samples) % CLASSES
    loader = world.loader(TensorDataset(x, y), global_batch_size=8)
    evaluator = allstep.create_supervised_evaluator(model)
    Metrics(
        {
            "accuracy": classification.MulticlassAccuracy(CLASSES, average="micro"),
            "confusion": classification.MulticlassConfusionMatrix(CLASSES),
            "auroc": classification.MulticlassAUROC(CLASSES),
        }
    ).attach(evaluator)
    Metrics({"samples": Sum(weighted=False, dtype=torch.int64), "low": Min(), "high": Max()}).attach(
        evaluator, {"samples": lambda o: torch.ones_like(o[1]), "low": lambda o: o[0], "high": lambda o: o[0]}
    )
    in_steps = observed_steps(evaluator)
    state = evaluator.run(loader)
    assert in_steps == [0] * len(in_steps)
    return dict(state.metrics)


@pytest.mark.parametrize("samples", [3, 17, 26])
def test_evaluation_counts_every_sample_once_at_any_world_size(samples: int) -> None:
    results = {}
    for world_size in (1, 2, 3, 4):
        found = run_ranks(digits, world_size, samples, timeout=150)
        assert all_same_bits(found)
        results[world_size] = found[0]
    for found in results.values():
        assert int(found["samples"]) == samples
        assert int(found["confusion"].sum()) == samples
        for name, value in results[1].items():
            torch.testing.assert_close(found[name], value)


def steps_of(world: World, kind: str) -> list[int]:
    """The collectives in each of two steps of an evaluator, by `kind` of evaluator."""
    model = normalised(world)
    if kind == "supervised":
        evaluator = allstep.create_supervised_evaluator(model)
    else:
        inner = world.unwrap(model) if kind == "unwrapped" else model
        evaluator = Engine(lambda engine, batch: inner.eval()(batch[0]), uneven="longest", idle="skip")
    in_steps = observed_steps(evaluator)
    evaluator.run([(torch.ones(2, 4), torch.zeros(2))] * 2)
    return in_steps


@pytest.mark.parametrize("kind", ["supervised", "unwrapped", "wrapped"])
def test_evaluation_runs_without_the_broadcasts_that_ddps_forward_begins(kind: str) -> None:
    for in_steps in run_ranks(steps_of, 2, kind, timeout=150):
        assert len(in_steps) == 2
        assert (in_steps == [0, 0]) == (kind != "wrapped")


def unequal(world: World, dealt: list[list[Any]]) -> tuple[int, torch.Tensor]:
    """How often an evaluator calls the module on this rank, and the confusion matrix of all ranks."""
    model = normalised(world)
    calls: list[None] = []
    world.unwrap(model).register_forward_hook(lambda module, given, out: calls.append(None))
    evaluator = allstep.create_supervised_evaluator(model)
    Metrics({"confusion": classification.MulticlassConfusionMatrix(CLASSES)}).attach(evaluator)
    state = evaluator.run(dealt[world.rank])
    return len(calls), state.metrics["confusion"]


def test_ranks_of_an_evaluation_may_have_different_numbers_of_batches() -> None:
    data = [(scores[:, :4], target) for scores, target in batches()]
    dealt = [data[:5], data[5:], []]
    ((_, single),) = run_ranks(unequal, 1, [data], timeout=150)
    found = run_ranks(unequal, 3, dealt, timeout=150)
    assert [calls for calls, _ in found] == [5, 2, 0]
    assert int(single.sum()) == sum(len(target) for _, target in data)
    assert all(confusion.tolist() == single.tolist() for _, confusion in found)


class MeanOverRanks(nn.Module):
    """A module whose forward pass waits for all ranks, as SyncBatchNorm's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.stack([x.sum(), torch.tensor(float(x.numel()))])
        if dist.is_initialized():
            dist.all_reduce(total)
        return x - total[0] / total[1] * 0


def longest(world: World, sizes: list[list[int]]) -> dict[str, Any]:
    model = MeanOverRanks()

    def step(engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        return model(batch)

    engine = Engine(step, uneven="longest")
    Metrics({"mean": Mean(), "n": Sum(weighted=False)}).attach(
        engine, {"mean": lambda o: o, "n": lambda o: torch.ones_like(o)}
    )
    rows = [torch.arange(float(n)) + 10 * at for at, n in enumerate(sizes[world.rank])]
    return dict(engine.run(rows).metrics)


def test_modules_with_collectives_are_evaluated_with_fillers_that_count_not() -> None:
    sizes = [[3, 2, 4], [1], [5, 5]]
    every = torch.cat([torch.arange(float(n)) + 10 * at for of_rank in sizes for at, n in enumerate(of_rank)])
    for found in run_ranks(longest, 3, sizes, timeout=150):
        assert float(found["n"]) == len(every)
        assert float(found["mean"]) == pytest.approx(float(every.mean()))


def large(world: World, size: int) -> tuple[Any, int]:
    engine = Engine(take)
    Metrics({"covariance": Wide(size)}).attach(engine)
    counts: list[int] = []
    with counted() as calls:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: counts.append(calls["all_reduce"]))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: counts.append(calls["all_reduce"]))
        engine.run([float(world.rank + 1)])
    return engine.state.metrics["covariance"], counts[1] - counts[0]


class Wide(Metric):
    """A state of `size` float64."""

    full_state_update = False
    total: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(size, dtype=torch.float64), "sum")

    def update(self, value: float) -> None:
        self.total += value

    def compute(self) -> torch.Tensor:
        return torch.stack([self.total.min(), self.total.max()])


def test_states_of_many_megabytes_are_reduced_and_not_gathered() -> None:
    reductions = []
    for size in (1_000_000, 20_000_000):
        found, calls = zip(*run_ranks(large, 2, size, timeout=150), strict=True)
        assert [each.tolist() for each in found] == [[3.0, 3.0]] * 2
        assert calls[0] == calls[1]
        reductions.append(calls[0])
    votes = reductions[0]  # a state of 8 MB goes in the gather, so what remains is the epoch's end
    assert reductions == [votes, votes + 1]
