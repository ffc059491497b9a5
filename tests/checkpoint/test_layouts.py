"""Issue 13 A9: what comes back lies in memory as what was saved, so that kernels that go over memory compute the same.

A fused optimizer pairs the elements of a parameter and of its moments by their places in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from allstep import Engine
from allstep.checkpoint import Checkpoint, Store
from tests.checkpoint.storages import some_state

LAYOUTS = {
    "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 3, 4, 5, 5).to(memory_format=torch.channels_last_3d),
    "transposed": torch.randn(6, 4).t(),
    "permuted": torch.randn(2, 3, 4).permute(1, 2, 0),
    "one channel": torch.randn(4, 1, 5, 5).to(memory_format=torch.channels_last),
    "float8": torch.randn(6, 4).to(torch.float8_e4m3fn).t(),
    "complex": torch.randn(6, 4, dtype=torch.complex64).t(),
    "bool": (torch.randn(6, 4) > 0).t(),
    "plain": torch.randn(3, 4),
}


def there_and_back(folder: Path, state: dict[str, Any], per_rank: Any = None) -> tuple[dict[str, Any], Any]:
    store = Store(str(folder))
    pending = store.save(1, state, per_rank)
    assert pending.wait(), pending.error
    found = store.choose()
    assert found is not None
    loaded = store.load(found)
    return loaded.state, loaded.per_rank[0]


def test_tensors_come_back_with_their_strides(tmp_path: Path) -> None:
    state, own = there_and_back(tmp_path, {"t": LAYOUTS}, LAYOUTS)
    for name, tensor in LAYOUTS.items():
        for back in (state["t"][name], own[name]):
            assert back.stride() == tensor.stride(), name
            assert torch.equal(
                back.view(torch.uint8) if back.is_floating_point() and back.itemsize == 1 else back,
                tensor.view(torch.uint8) if back.is_floating_point() and back.itemsize == 1 else tensor,
            )


def test_a_view_that_leaves_gaps_or_repeats_comes_back_contiguous(tmp_path: Path) -> None:
    views = {"gaps": torch.randn(6, 4)[:, ::2], "repeats": torch.randn(1, 4).expand(3, 4), "empty": torch.empty(0, 3)}
    state, _ = there_and_back(tmp_path, {"t": views})
    for name, tensor in views.items():
        assert torch.equal(state["t"][name], tensor)
        assert state["t"][name].is_contiguous()


@pytest.mark.parametrize("size", [3, 300])
def test_arrays_of_numpy_come_back_in_their_order(size: int, tmp_path: Path) -> None:
    arrays = {
        "fortran": np.asfortranarray(np.random.rand(size, size)),
        "permuted": np.random.rand(size, 4, size).transpose(2, 0, 1),
        "plain": np.random.rand(size, size),
    }
    state, _ = there_and_back(tmp_path, {"a": arrays})
    for name, array in arrays.items():
        assert state["a"][name].strides == array.strides, name
        assert (state["a"][name] == array).all()


def test_a_checkpoint_of_the_format_before_is_read(tmp_path: Path) -> None:
    """Without strides, which that format did not have."""
    import json

    from tests.checkpoint.test_hostile_files import forge
    from tests.checkpoint.test_reading import rewrite

    assert Store(str(tmp_path)).save(1, {"m": {"t": LAYOUTS["transposed"]}} | some_state()).wait()
    folder = tmp_path / "save-000001-step-1"
    state = json.loads((folder / "state.json").read_text())
    for record in state["tensors"].values():
        record.pop("strides", None)
    rewrite(folder, "state.json", json.dumps(state).encode())
    forge(folder, format=1)
    store = Store(str(tmp_path))
    found = store.choose()
    assert found is not None
    assert torch.equal(store.load(found).state["m"]["t"], LAYOUTS["transposed"])


class Net(nn.Module):
    """A convolution, a parameter that was made transposed, and a buffer that lies as the convolution's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.matrix = nn.Parameter(torch.randn(8, 5).t().contiguous().t())
        self.register_buffer("mean", torch.randn(8, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.conv.weight - 0.01 * self.mean
        return nn.functional.conv2d(x, kernel, self.conv.bias).mean((2, 3)) @ self.matrix


def made(kind: str, laid_out: bool = True) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    if laid_out:
        model = model.to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"fused": True} if kind == "fused" else {"foreach": kind == "foreach"}
    return model, torch.optim.AdamW(model.parameters(), lr=0.05, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["fused", "foreach", "plain"])
def test_a_resumed_optimizer_steps_as_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    model, optimizer = made(kind)
    train(model, optimizer, range(3))
    Checkpoint(tmp_path, {"model": model, "optimizer": optimizer}, every=None).save(engine, wait=True)
    train(model, optimizer, range(3, 6))

    again, its_optimizer = made(kind)
    Checkpoint(tmp_path, {"model": again, "optimizer": its_optimizer}, every=None).resume()
    train(again, its_optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].stride() == tensor.stride(), name


@pytest.mark.parametrize("kind", ["fused", "foreach", "plain"])
def test_moments_lie_as_the_parameters_of_a_run_that_lays_them_out_anew(kind: str, tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    model, optimizer = made(kind, laid_out=False)
    train(model, optimizer, range(3))
    Checkpoint(tmp_path, {"model": model, "optimizer": optimizer}, every=None).save(engine, wait=True)
    train(model, optimizer, range(3, 6))

    again, its_optimizer = made(kind, laid_out=True)
    Checkpoint(tmp_path, {"model": again, "optimizer": its_optimizer}, every=None).resume()
    assert all(its_optimizer.state[each]["exp_avg"].stride() == each.stride() for each in again.parameters())
    train(again, its_optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, atol=1e-5), name
