"""Audits: copies of a model that differ are named within two windows, and those that do not are never named."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from allstep import Engine, World
from allstep.engine.replica_audit import BitSums, differences, flip_bit
from allstep.errors import ArgumentError, ConfigurationError, RanksError, TermsError
from allstep.faults import FaultPlan
from allstep.faults.fault import FlippedBit
from allstep.testing import run_ranks


def trained(world: World, audit: int | None, iterations: int, clears_at_end: bool = False) -> tuple[list[str], int]:
    """The warnings of a run in one epoch, and the iteration of the first."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model = world.wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    said_at: list[int] = []

    def step(engine: Engine, batch: Any) -> None:
        if caught and not said_at:
            said_at.append(engine.state.iteration)
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    data = torch.randn(iterations, 3, 4, generator=torch.Generator().manual_seed(world.rank))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Engine(step, audit=audit, uneven="longest").run(list(data), window=4)
    return [str(each.message) for each in caught if "different models" in str(each.message)], (said_at or [0])[0]


def test_a_flipped_bit_is_named_with_its_rank_and_parameter():
    flipped = FaultPlan.at(rank=1, iteration=9, when="handler").flip("2.weight", bit=20)
    (texts, said_at), second, third = run_ranks(trained, 3, 5, 60, env=flipped.to_environ())
    assert len(texts) == 1
    assert "rank 1's 2.weight is not that of the other ranks" in texts[0]
    assert 9 < said_at <= 9 + 5 + 3 * 4
    assert second[0] == third[0] == []


def test_between_two_ranks_the_one_that_is_not_rank_0_is_named():
    flipped = FaultPlan.at(rank=0, iteration=9).flip("0.bias")
    (texts, _), _ = run_ranks(trained, 2, None, 12, env=flipped.to_environ())
    assert "rank 1's 0.bias is not that of rank 0" in texts[0]


def uneven(world: World) -> list[str]:
    return trained(world, 1, 10 + 25 * world.rank)[0]


def test_ranks_without_batches_and_cleared_gradients_are_no_difference():
    assert run_ranks(uneven, 3) == [[], [], []]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_every_bit_of_a_parameter_changes_what_is_said(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    module = nn.ParameterDict({"p": parameter})
    seen = {BitSums(1, module.named_parameters()).hash() % 2**20}
    for bit in range(8 * dtype.itemsize):
        flip_bit([module], FlippedBit("p", bit))
        seen.add(BitSums(1, module.named_parameters()).hash() % 2**20)
        flip_bit([module], FlippedBit("p", bit))
    assert len(seen) == 8 * dtype.itemsize + 1


def test_who_differs_is_told_by_what_most_ranks_hold():
    whole, other = {"a": 1, "b": 2}, {"a": 1, "b": 3}
    assert differences([other, whole, whole]) == {0: "b"}
    assert differences([whole, other]) == {1: "b"}
    assert differences([whole, other, {"a": 2, "b": 2}]) == {1: "b", 2: "a"}
    assert differences([whole, {"a": 1}]) == {1: "b"}
    assert differences([whole, whole]) == {}


def test_an_interval_that_is_no_count_is_refused():
    with pytest.raises(ArgumentError, match="audit is 0"):
        Engine(lambda engine, batch: None, audit=0)


def test_a_parameter_that_is_not_there_cannot_be_flipped():
    module = nn.ParameterDict({"p": nn.Parameter(torch.ones(3))})
    with pytest.raises(ConfigurationError, match="they have p"):
        flip_bit([module], FlippedBit("q"))
    with pytest.raises(ConfigurationError, match="bit 32"):
        flip_bit([module], FlippedBit("p", 32))


def unlike(world: World) -> None:
    trained(world, 5 + world.rank, 4)


def test_ranks_with_other_intervals_are_told_before_the_first_step():
    with pytest.raises(RanksError) as raised:
        run_ranks(unlike, 2)
    assert TermsError.__name__ in str(raised.value)
    assert "audit is rank 0: 5, rank 1: 6" in str(raised.value)
