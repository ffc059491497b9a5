"""Weights from safetensors files into plain and sharded models: what is read, by whom, and what is said of a misfit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from allstep.errors import ArgumentError, ArgumentTypeError, CheckpointError, DamagedCheckpointError
from allstep.parallel import load_pretrained
from allstep.testing import run_ranks
from allstep.world import World
from tests.memory import Peak
from tests.parallel.sharded_training import Block, Transformer, whole


def lay_out(folder: Path, state: dict[str, torch.Tensor], files: int = 2) -> dict[str, torch.Tensor]:
    """Write tensors as the hub has them; returns them."""
    folder.mkdir(exist_ok=True)
    placed = {name: f"model-{1 + at % files:05d}-of-{files:05d}.safetensors" for at, name in enumerate(state)}
    for file in set(placed.values()):
        save_file({name: state[name] for name, of in placed.items() if of == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return state


def weights(**changed: Any) -> dict[str, torch.Tensor]:
    """Of a transformer, without the second name of its tied weight."""
    state = Transformer(**changed).state_dict()
    return {name: torch.rand_like(value) for name, value in state.items() if name != "head.weight" or "tied" in changed}


def test_a_plain_model_gets_the_values_in_its_own_dtype(tmp_path: Path) -> None:
    state = lay_out(tmp_path, weights())
    model = Transformer().double()
    assert load_pretrained(nn.DataParallel(model), tmp_path) == ([], [])
    for name, value in state.items():
        found = model.state_dict()[name]
        assert found.dtype == torch.float64
        assert torch.equal(found, value.double())
    assert model.head.weight is model.embedding.weight


def on_parts(world: World, folder: str) -> tuple[list[torch.Tensor], int]:
    world.seed_everything(1)
    model = Transformer()
    names = world.mesh.mesh_dim_names
    if "tensor" in names:
        for block in model.blocks:
            parallelize_module(block, world.mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model = world.wrap(model, units=Block)
    world.load_pretrained(model, folder)
    model(torch.zeros(1, 5, dtype=torch.int64))  # some parameters are gathered now, and loading puts them in parts
    world.load_pretrained(model, folder)
    return [whole(each) for each in model.parameters()], sum(isinstance(each, DTensor) for each in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (3, "shard=3"),
        pytest.param(4, "replicate=2,shard=2", marks=pytest.mark.nightly),
        pytest.param(4, "shard=2,tensor=2", marks=pytest.mark.nightly),
    ],
)
def test_a_model_in_parts_gets_the_same_values(ranks: int, mesh: str, tmp_path: Path) -> None:
    state = lay_out(tmp_path, weights())
    for found, in_parts in run_ranks(on_parts, ranks, str(tmp_path), env={"ALLSTEP_MESH": mesh}):
        assert in_parts == len(state)
        assert all(map(torch.equal, found, state.values()))


ROWS = (80 << 20) // 4 // 1024  # of 1024 float32, which take 80 MB


def taken_to_read(world: World, folder: str) -> int:
    model = world.wrap(nn.Linear(1024, ROWS, bias=False), units=nn.Linear)
    with Peak() as peak:
        world.load_pretrained(model, folder)
    assert torch.equal(model.weight.to_local()[:, 0], torch.arange(ROWS).chunk(2)[world.rank].float())
    return peak.bytes


@pytest.mark.slow
def test_each_rank_reads_its_own_part(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(ROWS).float()[:, None].repeat(1, 1024)}, tmp_path / "model.safetensors")
    # 40 MB for its half, and the same once more for the pages of the file; a reader of all would have 160 MB.
    for taken in run_ranks(taken_to_read, 2, str(tmp_path), env={"ALLSTEP_MESH": "shard=2"}):
        assert taken < 110 << 20


def test_names_can_be_changed_left_out_and_in_one_file(tmp_path: Path) -> None:
    state = weights(tied=False)
    save_file(
        {f"model.{name}": value for name, value in state.items()} | {"extra": torch.ones(1)}, tmp_path / "x.safetensors"
    )
    model = Transformer(tied=False)
    load_pretrained(
        model, tmp_path / "x.safetensors", rename=lambda name: None if name == "extra" else name.removeprefix("model.")
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="has two tensors for one: "):
        load_pretrained(model, tmp_path, rename=lambda name: "one")


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path: Path) -> None:
    state = weights()
    model = Transformer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = lay_out(tmp_path / "a", {name: value for name, value in state.items() if "0.up.bias" not in name})
    lay_out(tmp_path / "b", other | {"blocks.0.up.bais": torch.ones(24)})
    lay_out(tmp_path / "c", {f"model.{name}": value for name, value in state.items()})
    lay_out(tmp_path / "d", state | {"blocks.0.up.bias": torch.ones(3)})
    for folder, said in {
        "a": "does not fit the model: it lacks blocks.0.up.bias. Give rename=",
        "b": "lacks blocks.0.up.bias; the model has no blocks.0.up.bais; did you mean blocks.0.up.bias?",
        "c": r"and 1\d more.* give rename=lambda name: name.removeprefix\('model.'\)",
        "d": r"blocks.0.up.bias has shape \[3\] in .* and \[24\] in the model; build the model",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            load_pretrained(model, tmp_path / folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = load_pretrained(model, tmp_path / "b", strict=False)
    assert found == (["blocks.0.up.bias"], ["blocks.0.up.bais"])
    assert torch.equal(model.blocks[0].up.bias, before["blocks.0.up.bias"])
    assert torch.equal(model.blocks[0].up.weight, state["blocks.0.up.weight"])


def test_what_is_no_folder_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    model = nn.Linear(2, 2)
    for path, said in {
        tmp_path / "no": "there is no folder",
        tmp_path / "notes.txt": "is no .safetensors file",
        tmp_path: "has no .safetensors file",
    }.items():
        with pytest.raises(ArgumentError, match=said):
            load_pretrained(model, path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match=r"2 files of tensors and no index, a\.safetensors, b\.safe"):
        load_pretrained(model, tmp_path)
    with pytest.raises(DamagedCheckpointError, match="cannot be read as safetensors"):
        load_pretrained(model, tmp_path / "a.safetensors")
    with pytest.raises(ArgumentTypeError, match="rename is 'x'"):
        load_pretrained(model, tmp_path, rename="x")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="weight is on the meta device"):
        load_pretrained(nn.Linear(2, 2, device="meta"), tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"weight": "../x.safetensors"}}, "no file of this folder"),
        ({"weight_map": {"weight": "gone.safetensors"}}, "names gone.safetensors, which is not there"),
        ({"weight_map": {"wieght": "x.safetensors"}}, "lacks wieght"),
        ({"map": {}}, "is no index of tensors"),
        ([], "is no index of tensors"),
    ],
)
def test_an_index_that_is_wrong_is_refused(index: Any, said: str, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedCheckpointError, match=said):
        load_pretrained(nn.Linear(2, 2), tmp_path)
