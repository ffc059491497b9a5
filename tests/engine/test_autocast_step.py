"""Engine(precision=): forward passes of the step in mixed precision, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from allstep import Alone, Engine, Events, World, init
from allstep.errors import ArgumentError, ParallelError, TermsError
from allstep.testing import SimulatedRank, run_ranks, simulate


class Noting(nn.Module):
    """Notes the dtype that its layer computes in; returns a nested output, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        scores = self.layer(x)
        self.seen.append(scores.dtype)
        if x.isnan().any():
            raise ValueError("bad input")
        return {"scores": scores, "rows": len(x)}


def engine_of(model: nn.Module, **options: Any) -> Engine:
    def step(engine: Engine, batch: torch.Tensor) -> Any:
        scores = model(batch)["scores"]
        F.mse_loss(scores, torch.ones_like(scores)).backward()
        return scores.dtype, torch.is_autocast_enabled("cpu"), (batch @ batch.T).dtype

    engine = Engine(step, **({"coordinator": Alone(), "precision": "bf16"} | options))
    engine.modules.append(model)
    return engine


def batch() -> torch.Tensor:
    return torch.ones(2, 4)


def test_forward_passes_of_modules_are_in_autocast_and_give_on_float32() -> None:
    model = Noting()
    output = engine_of(model).run([batch()]).output
    assert model.seen == [torch.bfloat16]
    assert output == (torch.float32, False, torch.float32)
    assert model.layer.weight.grad is not None


def test_without_a_precision_nothing_is_cast() -> None:
    model = Noting()
    engine_of(model, precision="no").run([batch()])
    assert model.seen == [torch.float32]


def test_forward_passes_outside_of_the_step_are_not_cast() -> None:
    model = Noting()
    engine = engine_of(model)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: model(batch()))
    engine.run([batch()] * 2)
    assert model.seen == [torch.bfloat16, torch.float32] * 2


def test_a_forward_pass_that_raises_leaves_no_autocast_behind() -> None:
    model = Noting()
    with pytest.raises(ValueError, match="bad input"):
        engine_of(model).run([torch.full((1, 4), torch.nan)])
    assert not torch.is_autocast_enabled("cpu")
    model(batch())
    assert model.seen == [torch.bfloat16, torch.float32]


def test_a_precision_without_a_module_is_refused_before_anything_has_changed() -> None:
    engine = Engine(lambda engine, batch: None, precision="bf16", coordinator=Alone())
    with pytest.raises(ArgumentError, match=r"append it to engine\.modules"):
        engine.run([0])
    assert engine.state.dataloader is None


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ArgumentError, match="precision is 'fp8'"):
        Engine(lambda engine, batch: None, precision="fp8")  # type: ignore[arg-type]


def _differing(coordinator: SimulatedRank) -> str:
    engine = engine_of(Noting(), coordinator=coordinator, precision="no" if coordinator.rank else "bf16", name="one")
    with pytest.raises(TermsError) as caught:
        engine.run([batch()])
    return str(caught.value)


def test_ranks_with_different_precisions_are_told_so() -> None:
    assert all("precision" in said for said in simulate(_differing, 2))


@pytest.fixture
def world() -> Iterator[World]:
    with init() as opened:
        yield opened


def test_a_worlds_autocast_is_of_its_device(world: World) -> None:
    layer = nn.Linear(4, 3)
    with world.autocast():
        assert layer(batch()).dtype is torch.bfloat16
    with world.autocast("no"):
        assert layer(batch()).dtype is torch.float32
    with pytest.raises(ParallelError, match="fp8"):
        world.autocast("fp8")  # type: ignore[arg-type]


def _trained(world: World) -> tuple[set[torch.dtype], list[torch.Tensor]]:
    model = world.wrap(Noting())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        scores = model(batch)["scores"]
        (F.mse_loss(scores, torch.ones_like(scores)) * engine.state.weight).backward()
        optimizer.step()

    Engine(step, precision="bf16").run([torch.full((2, 4), 1.0 + world.rank)] * 4)
    inner = world.unwrap(model)
    return set(inner.seen), [each.detach() for each in inner.parameters()]


@pytest.mark.slow
def test_modules_in_ddp_are_cast_and_ranks_stay_one_model() -> None:
    (dtypes, first), (_, second) = run_ranks(_trained, 2)
    assert torch.bfloat16 in dtypes
    assert all(map(torch.equal, first, second))
    assert all(each.dtype is torch.float32 for each in first)
