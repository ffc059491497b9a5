"""Real ranks save one state together, and any number of ranks reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from allstep.checkpoint import Store
from allstep.errors import CheckpointError
from allstep.testing import run_ranks
from allstep.world import World
from tests.checkpoint.storages import some_state
from tests.regression import same

pytestmark = pytest.mark.slow


LARGE = {"embedding": torch.arange(2_500_000.0).reshape(2500, 1000)}


def save_replicated(world: World, folder: Path) -> tuple[bool, str | None]:
    store = Store(str(folder))
    state = {"model": LARGE | some_state()["model"], "trainer": {"iteration": 7}}
    own = {"rank": world.rank, "noise": torch.full((3,), float(world.rank))}
    pending = store.save(7, state, own, {"loss": 0.5})
    return pending.wait(), pending.name


def load_replicated(world: World, folder: Path) -> tuple[bool, list[Any]]:
    store = Store(str(folder))
    found = store.choose()
    assert found is not None
    loaded = store.load(found)
    return same(loaded.state["model"], LARGE | some_state()["model"]), loaded.per_rank


@pytest.mark.parametrize("saving", [2, 3])
def test_what_is_replicated_is_written_once_by_all_and_read_at_any_world_size(saving: int, tmp_path: Path) -> None:
    assert run_ranks(save_replicated, saving, tmp_path) == [(True, "save-000001-step-7")] * saving
    folder = tmp_path / "save-000001-step-7"
    sizes = [(folder / f"rank_{rank:05d}.safetensors").stat().st_size for rank in range(saving)]
    assert sum(sizes) < 1.01 * LARGE["embedding"].nbytes
    assert max(sizes) < 1.1 * min(sizes)
    for loading in (1, 4 - saving // 2):
        for whole, per_rank in run_ranks(load_replicated, loading, tmp_path):
            assert whole
            assert [own["rank"] for own in per_rank] == list(range(saving))
            assert [own["noise"][0].item() for own in per_rank] == list(range(saving))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)  # 13 rows: shards of uneven size, and at 4 ranks of 5, 3 rows, an empty one
        self.second = nn.Linear(13, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.second(self.first(x).relu())


def sharded(world: World, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Block()
    mesh = init_device_mesh("cpu", (world.world_size,))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 7)).square().sum().backward()
    optimizer.step()


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value


# torch's DTensor remembers which rank a process is, so these ask for fresh processes.
def save_sharded(world: World, folder: Path) -> dict[str, Any]:
    model, optimizer = sharded(world, 0)
    train(model, optimizer)
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    assert Store(str(folder)).save(1, state).wait()
    return {name: whole(part) for name, part in state.items()}


def load_sharded(world: World, folder: Path) -> dict[str, Any]:
    model, optimizer = sharded(world, 1)
    train(model, optimizer)  # so that the optimizer has a state of shards
    template = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    store = Store(str(folder))
    found = store.choose()
    assert found is not None
    loaded = store.load(found, template)
    weight = loaded.state["model"]["first.weight"]
    assert weight is template["model"]["first.weight"]
    model.load_state_dict(loaded.state["model"])
    optimizer.load_state_dict(loaded.state["optimizer"])
    return {"model": whole(dict(model.state_dict())), "optimizer": whole(optimizer.state_dict())}


@pytest.mark.parametrize("world_sizes", [(1, 4), pytest.param((2, 3), marks=pytest.mark.nightly)])
def test_fsdp_shards_are_read_at_any_world_size(tmp_path: Path, world_sizes: tuple[int, ...]) -> None:
    saved = run_ranks(save_sharded, 2, tmp_path)[0]
    rows = json.loads((tmp_path / "save-000001-step-1" / "state.json").read_text())["tensors"]["model/first.weight"]
    assert [chunk["sizes"] for chunk in rows["chunks"]] == [[7, 7], [6, 7]]
    for world_size in world_sizes:
        for loaded in run_ranks(load_sharded, world_size, tmp_path):
            assert same(loaded["model"], saved["model"])
            assert same(loaded["optimizer"]["state"], saved["optimizer"]["state"])


def test_sharded_state_is_whole_where_nothing_is_sharded(tmp_path: Path) -> None:
    saved = run_ranks(save_sharded, 3, tmp_path)[0]
    store = Store(str(tmp_path))
    found = store.choose()
    assert found is not None
    state = store.load(found).state
    assert same(state["model"], saved["model"])
    assert same(state["optimizer"]["state"], saved["optimizer"]["state"])


def save_mesh(world: World, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    tensor = torch.arange(60.0).reshape(6, 10)
    state = {
        f"t{at}": distribute_tensor(tensor + at, mesh, placements)
        for at, placements in enumerate(
            [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(0), Shard(0)), (Replicate(), Replicate())]
        )
    }
    assert Store(str(folder)).save(1, {"mesh": state}).wait()


def load_columns(world: World, folder: Path) -> list[bool]:
    mesh = init_device_mesh("cpu", (world.world_size,))
    template = {f"t{at}": distribute_tensor(torch.zeros(6, 10), mesh, [Shard(1)]) for at in range(4)}
    store = Store(str(folder))
    found = store.choose()
    assert found is not None
    loaded = store.load(found, {"mesh": template}).state["mesh"]
    expected = torch.arange(60.0).reshape(6, 10)
    return [torch.equal(loaded[f"t{at}"].full_tensor(), expected + at) for at in range(4)]


def test_each_box_of_a_mesh_is_written_once_and_read_in_another_cut(tmp_path: Path) -> None:
    run_ranks(save_mesh, 4, tmp_path)
    index = json.loads((tmp_path / "save-000001-step-1" / "state.json").read_text())["tensors"]
    assert [len(record["chunks"]) for record in index.values()] == [2, 4, 4, 1]
    assert run_ranks(load_columns, 3, tmp_path) == [[True] * 4] * 3


def load_wrong_shape(world: World, folder: Path) -> str:
    mesh = init_device_mesh("cpu", (world.world_size,))
    store = Store(str(folder))
    found = store.choose()
    assert found is not None
    rows = 13 if world.rank == 0 else 14
    template = {
        "model": {"first.weight": distribute_tensor(torch.zeros(rows, 7), mesh, [Shard(0)], src_data_rank=None)}
    }
    try:
        store.load(found, template)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_one_rank_that_cannot_load_is_an_error_on_all(tmp_path: Path) -> None:
    run_ranks(save_sharded, 2, tmp_path)
    for said in run_ranks(load_wrong_shape, 2, tmp_path):
        assert "rank 1" in said
        assert "shape [13, 7]" in said
