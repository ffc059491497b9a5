"""Fréchet distance and inception score over ranks are those of one process on all samples."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from allstep.metrics import FrechetDistance
from allstep.testing import run_ranks
from allstep.world import World, internals
from tests.metrics.worlds import all_same_bits, deal, on_one, over_ranks, results

FEATURES = 12


def extractor(out: int = FEATURES) -> nn.Module:
    """Always the same network; its generator is its own, since simulated ranks share the global one."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, out))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.3, 0.3, generator=generator)
    return network


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {"fake": torch.rand(n, 1, 4, 4, generator=generator), "real": torch.rand(n, 1, 4, 4, generator=generator) ** 2}
        for n in (30, 7, 50, 21, 40, 16)
    ]


def make() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = InceptionScore(extractor(10).eval(), splits=1)
    return {"fid": FrechetDistance(extractor(), FEATURES), "score": score}


TRANSFORMS: Any = {"fid": lambda o: o, "score": lambda o: (o["fake"],)}


def of_all_samples() -> float:
    """torchmetrics in one process, on all samples at once."""
    network = extractor().eval()
    network.num_features = FEATURES  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=network)
    data = batches()
    for name, real in (("real", True), ("fake", False)):
        metric.update(torch.cat([batch[name] for batch in data]), real=real)
    return float(metric.compute())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_they_are_those_of_one_process_also_with_a_rank_without_samples(world_size: int) -> None:
    expected, single = of_all_samples(), on_one(make, batches(), TRANSFORMS)
    assert float(single["fid"]) == pytest.approx(expected, rel=1e-5)
    for empty in (None, 0):
        found = over_ranks(make, deal(batches(), world_size, empty=empty), TRANSFORMS)
        assert all_same_bits(found)
        assert float(found[0]["fid"]) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(found[0]["score"][0], single["score"][0])


def test_the_extractor_keeps_the_mode_of_each_of_its_modules() -> None:
    network = extractor()
    network[1].eval()  # one that its owner has frozen
    modes = [module.training for module in network.modules()]
    modes_inside: list[bool] = []
    network[3].register_forward_hook(lambda module, given, out: modes_inside.append(module.training))
    metric = FrechetDistance(network, FEATURES)
    batch = batches()[0]
    metric.update(batch["fake"], batch["real"])
    assert [module.training for module in network.modules()] == modes
    assert modes_inside == [False, False]
    with pytest.raises(RuntimeError):
        metric.update(torch.ones(2, 3), torch.ones(2, 3))
    assert [module.training for module in network.modules()] == modes


def over_real_ranks(world: World, dealt: list[list[Any]]) -> dict[str, Any]:
    return results(internals(world).coordinator, make, dealt[world.rank], TRANSFORMS)


@pytest.mark.slow
def test_over_three_real_ranks_too() -> None:
    found = run_ranks(over_real_ranks, 3, deal(batches(), 3))
    assert all_same_bits(found)
    assert float(found[0]["fid"]) == pytest.approx(of_all_samples(), rel=1e-5)
