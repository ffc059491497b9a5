"""GradientClipping: what an optimizer steps on, with accumulation, a gradient scaler and several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from allstep import Alone, Engine, GradientClipping, World, create_supervised_trainer
from allstep.testing import run_ranks


def stepping(optimizer: torch.optim.Optimizer, gradient: torch.Tensor) -> Engine:
    """An engine whose steps have this gradient, added up over a group."""
    (parameter,) = optimizer.param_groups[0]["params"]

    def step(engine: Engine, batch: Any) -> None:
        parameter.grad = gradient.clone() + (0 if parameter.grad is None else parameter.grad)
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()

    return Engine(step, coordinator=Alone(), accumulate=2)


def descended(gradient: list[float], **limits: Any) -> tuple[list[float], Any]:
    """How far one optimizer step over a group of two went, and the norm that was noted."""
    parameter = nn.Parameter(torch.zeros(len(gradient)))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = stepping(optimizer, torch.tensor(gradient))
    clipping = GradientClipping(optimizer, **limits).attach(engine)
    engine.run(range(2))
    return (-parameter.detach()).tolist(), clipping.norm


def test_a_norm_above_the_limit_is_scaled_down_once_a_group() -> None:
    went, norm = descended([3.0, 4.0], max_norm=5.0)
    assert went == pytest.approx([3.0, 4.0], rel=1e-5)
    assert float(norm) == pytest.approx(10.0)


def test_a_norm_below_the_limit_is_left_alone() -> None:
    assert descended([3.0, 4.0], max_norm=100.0)[0] == [6.0, 8.0]


def test_another_norm_may_be_meant() -> None:
    assert float(descended([3.0, 4.0], max_norm=1.0, norm_type=float("inf"))[1]) == 8.0


def test_values_are_bounded_each_for_itself() -> None:
    assert descended([3.0, -4.0, 0.5], max_value=2.0)[0] == [2.0, -2.0, 1.0]


def test_detached_it_leaves_gradients_alone() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = stepping(optimizer, torch.tensor([3.0]))
    clipping = GradientClipping(optimizer, max_norm=1.0).attach(engine).attach(engine)
    clipping.detach()
    clipping.detach()
    engine.run(range(2))
    assert parameter.item() == -6.0


@pytest.mark.parametrize("limits", [{"max_norm": 0.01}, {"max_value": 0.001}])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler_the_limit_is_of_unscaled_gradients(limits: Any, fused: bool) -> None:
    def trained(scaled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        trainer = create_supervised_trainer(model, optimizer, F.cross_entropy, scaler=scaler)
        GradientClipping(optimizer, **limits).attach(trainer)
        generator = torch.Generator().manual_seed(1)
        trainer.run([(torch.randn(5, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1]))] * 3)
        return [each.detach() for each in model.parameters()]

    torch.testing.assert_close(trained(True), trained(False))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ValueError, "max_norm is None"),
        ({"max_norm": 1.0, "max_value": 1.0}, ValueError, "give one"),
        ({"max_norm": 0.0}, ValueError, "max_norm is 0.0"),
        ({"max_value": -1.0}, ValueError, "max_value is -1.0"),
        ({"optimizer": 3, "max_norm": 1.0}, TypeError, "optimizer is 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(error, match=text):
        GradientClipping(**({"optimizer": optimizer} | arguments))


def _clipped(world: World, rows: int) -> tuple[list[torch.Tensor], float]:
    world.seed_everything(0)
    model = world.wrap(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy)
    clipping = GradientClipping(optimizer, max_norm=0.05).attach(trainer)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
    data = [(x, torch.arange(12) % 3)] * 3
    trainer.run([(x[world.rank :: world.world_size], y[world.rank :: world.world_size]) for x, y in data])
    assert clipping.norm is not None
    return [each.detach() for each in model.parameters()], float(clipping.norm)


@pytest.mark.slow
def test_two_ranks_clip_the_gradient_of_all_samples_as_one_does() -> None:
    first, second = run_ranks(_clipped, 2, 6)
    (alone,) = run_ranks(_clipped, 1, 12)
    assert first[1] == second[1] == pytest.approx(alone[1], rel=1e-4)
    assert all(map(torch.equal, first[0], second[0]))
    torch.testing.assert_close(first[0], alone[0])
