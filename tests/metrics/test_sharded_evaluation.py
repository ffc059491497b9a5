"""Modules that wait for other ranks in their forward pass: evaluated over uneven ranks by fillers of weight zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import classification

from allstep import Engine, Metrics, Sum
from allstep.testing import run_ranks
from allstep.world import World
from tests.metrics.counting import begun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLASSES = 5
SIZES = (5, 1, 8, 3, 3, 7, 2)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 4, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in SIZES]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()


def metrics() -> Metrics:
    return Metrics(
        {
            "accuracy": classification.MulticlassAccuracy(CLASSES, average="micro"),
            "confusion": classification.MulticlassConfusionMatrix(CLASSES),
            "auroc": classification.MulticlassAUROC(CLASSES),
            "samples": Sum(weighted=False, dtype=torch.int64),
        }
    )


def transform(output: Any) -> Any:
    scores, y = output
    return {"preds": scores, "target": y, "value": torch.ones_like(y)}


def sharded(world: World, dealt: list[list[Any]]) -> tuple[dict[str, torch.Tensor], list[tuple[bool, float, int]]]:
    """The results of an FSDP2 module, and of each iteration if it was this rank's own, its weight and collectives."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    steps: list[tuple[bool, float, int]] = []

    @torch.no_grad()
    def step(engine: Engine, batch: Any) -> Any:
        x, y = batch
        before = begun()
        scores = model(x)
        steps.append((engine.state.active, engine.state.weight, begun() - before))
        return scores, y

    evaluator = Engine(step, uneven="longest")
    metrics().attach(evaluator, transform)
    return dict(evaluator.run(dealt[world.rank]).metrics), steps


def by_torchmetrics() -> dict[str, torch.Tensor]:
    """One process, torchmetrics alone."""
    model, found = network(), {}
    for name, metric in {
        "accuracy": classification.MulticlassAccuracy(CLASSES, average="micro"),
        "confusion": classification.MulticlassConfusionMatrix(CLASSES),
        "auroc": classification.MulticlassAUROC(CLASSES),
    }.items():
        for x, y in batches():
            metric.update(model(x).detach(), y)
        found[name] = metric.compute()
    return found


def test_an_fsdp_module_is_evaluated_exactly_over_uneven_ranks() -> None:
    data = batches()
    dealt = [data[:4], data[4:], []]
    expected = by_torchmetrics()
    for rank, (results, steps) in enumerate(run_ranks(sharded, 3, dealt, timeout=150)):
        assert [active for active, _, _ in steps] == [at < len(dealt[rank]) for at in range(4)]
        assert all((weight == 0) != active for active, weight, _ in steps)
        assert all(collectives > 0 for _, _, collectives in steps)
        assert int(results["samples"]) == sum(SIZES)
        for name, value in expected.items():
            torch.testing.assert_close(results[name], value)
