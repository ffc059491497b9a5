"""A model that one rank still has, and another has let go of, is in no collective of a run."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from allstep import Engine
from allstep.testing import run_ranks
from allstep.world import World


def train_beside_a_leftover(world: World) -> tuple[int, list[float]]:
    def made() -> nn.Module:
        return world.wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))

    leftover: nn.Module | None = made()
    model = made()
    if world.rank == 1:
        leftover = None
        gc.collect()
    engine = Engine(lambda engine, batch: model(torch.ones(2, 2) + world.rank).sum().backward())
    engine.run([0] * 3, max_epochs=2)
    del leftover
    return engine.state.iteration, [each.sum().item() for each in world.unwrap(model).buffers()]


@pytest.mark.slow
def test_a_model_that_only_some_ranks_still_have_holds_up_nobody() -> None:
    first, second = run_ranks(train_beside_a_leftover, 2)
    assert first[0] == 6
    assert first == second
