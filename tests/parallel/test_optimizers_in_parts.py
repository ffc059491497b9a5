"""Which of torch's optimizers step on parameters in parts, and what is said where torch names DTensors alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import allstep
from allstep.testing import run_ranks
from allstep.world import World

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "meshes.md"


def moved(optimizer: str, model: nn.Module) -> None:
    """Take three steps."""
    stepping: Any = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    batch = torch.arange(8.0, dtype=torch.float64).reshape(2, 4) / 8

    def closure() -> torch.Tensor:
        stepping.zero_grad()
        loss = (model(batch) - 1).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(3):
        stepping.step(closure)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False)).double()


def test_an_optimizer_that_cannot_step_on_parts_is_named() -> None:
    with (
        pytest.raises(RuntimeError) as raised,
        allstep.init(device="cpu", mesh={"shard": 1}) as world,
    ):
        moved("Adafactor", world.wrap(model(), units=nn.Linear))
    assert "Adafactor was stepping parameters in parts" in raised.value.__notes__[0]
    assert "AdamW" in raised.value.__notes__[0]


def test_an_error_of_another_kind_is_left_as_it_is() -> None:
    with pytest.raises(RuntimeError) as raised, allstep.init(device="cpu"):  # noqa: PT012
        optimizer = torch.optim.SGD(model().parameters())
        optimizer.step(lambda: torch.ones(2).sum().backward())
    assert not getattr(raised.value, "__notes__", [])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.blocks = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.layer(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def encoding(encoder: Any) -> None:
    encoder.encode(torch.ones(2, 4))


def heading(encoder: Any) -> None:
    encoder(encoder.head(torch.ones(2, 4)))


def multiplying(encoder: Any) -> None:
    torch.ones(2, 4) @ encoder.layer.weight


@pytest.mark.parametrize(
    ("computes", "said"),
    [
        (encoding, r"Encoder\.encode computed with parameters in parts\. .*forward_method\(model, 'encode'\)"),
        (heading, "a unit of the model ran before the model as a whole did"),
        (multiplying, r"outside of its model's forward pass, .*whole_tensor\(parameter\)"),
    ],
)
def test_computing_past_the_forward_pass_is_told_from_other_errors(computes: Any, said: str) -> None:
    with pytest.raises(RuntimeError) as raised, allstep.init(device="cpu", mesh={"shard": 1}) as world:
        computes(world.wrap(Encoder(), units=nn.Sequential))
    assert re.search(said, raised.value.__notes__[0])


def on_parts(world: World) -> dict[str, str]:
    """By optimizer, whether steps on parts are those on the whole."""
    names = [name for name, each in vars(torch.optim).items() if isinstance(each, type) and name != "Optimizer"]
    found = {}
    for name in names:
        plain, parts = model(), world.wrap(model(), units=nn.Linear)
        try:
            moved(name, plain)
            moved(name, parts)
        except Exception:
            found[name] = "no"
            continue
        pairs = zip(plain.parameters(), parts.parameters(), strict=True)
        apart = max(float((one - other.full_tensor()).abs().max()) for one, other in pairs)  # type: ignore[operator]
        found[name] = "yes" if apart < 1e-9 else "rounded" if apart < 0.1 else f"apart by {apart}"
    return found


@pytest.mark.slow
@pytest.mark.nightly
def test_the_page_says_which_optimizers_step_on_parts() -> None:
    said = dict(re.findall(r"^\| `torch\.optim\.(\w+)` \| (\w+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert run_ranks(on_parts, 2, env={"ALLSTEP_MESH": "shard=2"}) == [said, said]
