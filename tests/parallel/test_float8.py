"""Float8: refused where there is none, and which layers it is."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import allstep
from allstep.errors import ParallelError
from allstep.parallel.float8 import linears_in_float8
from allstep.testing import run_ranks
from allstep.world import World


def test_float8_is_refused_on_the_cpu_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with allstep.init(device="cpu") as world, pytest.raises(ParallelError, match=r"device is cpu.*Use \"bf16\" here"):
        world.wrap(model, precision="float8")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_float8_asks_for_a_device_that_has_it(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    said = r"compute capability 8\.0" if refused else r"pip install 'allstep\[float8\]'"
    with pytest.raises(ParallelError, match=said):
        linears_in_float8(nn.Sequential(nn.Linear(16, 16)), torch.device("cuda", 0))


def in_float8(world: World) -> tuple[int, float, float, list[str]]:
    world.seed_everything(3)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 3))
    batch = torch.randn(16, 32)
    plain = model(batch)
    converted = len(linears_in_float8(model, world.device, emulated=True))
    model = world.wrap(model, precision="bf16", units=nn.Linear)
    output = model(batch)
    (output - 1).square().mean().backward()
    names = [name for name, each in model.named_parameters() if each.grad is not None]
    return converted, float((output - plain).norm() / plain.norm()), float(plain.norm()), names


@pytest.mark.nightly
@pytest.mark.slow
def test_layers_in_emulated_float8_compute_and_train_in_parts() -> None:
    pytest.importorskip("torchao", reason="an extra: pip install 'allstep[float8]'")
    for converted, apart, _, names in run_ranks(in_float8, 2, env={"ALLSTEP_MESH": "shard=2"}):
        assert converted == 1  # the other has 3 outputs
        assert 0 < apart < 0.1
        assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.nightly
def test_a_model_without_a_layer_for_float8_is_refused() -> None:
    pytest.importorskip("torchao", reason="an extra: pip install 'allstep[float8]'")
    with pytest.raises(ParallelError, match="multiples of 16"):
        linears_in_float8(nn.Sequential(nn.Linear(3, 5)), torch.device("cpu"), emulated=True)
