"""Parameters that sharding leaves whole: the same on all ranks, in training and in checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from allstep.testing import run_ranks
from tests.parallel.sharded_training import Block, Plan, Transformer, train

pytestmark = pytest.mark.slow


def begun_apart() -> nn.Module:
    """A model whose norms begin with other values on each rank but the first."""
    model = Transformer()
    with torch.no_grad():
        for each in norms_of(model):
            each += torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return model


def norms_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "norm" in name]


@pytest.mark.nightly
@pytest.mark.parametrize(("ranks", "mesh"), [(2, "shard=2"), (4, "replicate=2,shard=2")])
def test_ignored_parameters_train_and_resume_as_on_one_process(ranks: int, mesh: str, tmp_path: Path) -> None:
    plan = Plan(make=begun_apart, options=(("units", Block), ("ignored", norms_of)), epochs=2)
    (alone,) = run_ranks(train, 1, plan)
    saved = replace(plan, folder=str(tmp_path))
    run_ranks(train, 3, replace(saved, epochs=1), env={"ALLSTEP_MESH": "shard=3"})
    first, second, *_ = run_ranks(train, ranks, saved, env={"ALLSTEP_MESH": mesh})
    for name, expected in alone["parameters"].items():
        torch.testing.assert_close(first["parameters"][name], expected, rtol=1e-6, atol=1e-8)
        assert torch.equal(first["parameters"][name], second["parameters"][name])
