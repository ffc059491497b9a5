"""One file out of a checkpoint, read without allstep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from allstep import Engine
from allstep.checkpoint import Checkpoint, Store, export, find_entry
from allstep.errors import ArgumentError, CheckpointError, DamagedCheckpointError
from tests.checkpoint.storages import flip, some_state
from tests.memory import Peak
from tests.regression import same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = some_state(3) | {"extra": {"scale": np.float32(0.5), "table": np.arange(3), "pair": (1, None)}}
    state["model"]["phase"] = torch.complex(torch.ones(2), torch.zeros(2))
    assert Store(str(tmp_path / "c")).save(3, state).wait()
    return tmp_path / "c"


def test_torch_loads_all_of_a_pt_file_safely(folder: Path, tmp_path: Path) -> None:
    export(find_entry(str(folder), None), str(tmp_path / "all.pt"))
    state: dict[str, Any] = torch.load(tmp_path / "all.pt", weights_only=True)
    assert same(state["optimizer"]["param_groups"], some_state(3)["optimizer"]["param_groups"])
    assert list(state["optimizer"]["state"]) == [0, 1, 2, 3]
    assert state["extra"]["scale"] == 0.5
    assert state["extra"]["table"].tolist() == [0, 1, 2]
    assert state["extra"]["pair"] == (1, None)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_model_alone_has_the_names_that_load_state_dict_expects(suffix: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    export(find_entry(str(folder), None), str(path), only="model")
    if suffix == ".pt":
        state = torch.load(path, weights_only=True)
    else:
        state = pytest.importorskip("safetensors.torch").load_file(path)
        assert torch.equal(torch.view_as_complex(state["phase"]), torch.ones(2, dtype=torch.complex64))
    del state["phase"]
    assert same(state, some_state(3)["model"])


def test_several_parts_keep_theirs_in_the_names(folder: Path, tmp_path: Path) -> None:
    export(find_entry(str(folder), None), str(tmp_path / "all.safetensors"))
    names = pytest.importorskip("safetensors.torch").load_file(tmp_path / "all.safetensors")
    assert {"model/layer0.weight", "optimizer/state/0/exp_avg"} <= names.keys()


class Tied(nn.Module):
    """An embedding whose weight is also the output's, and parameters in a list, whose keys are digits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.scales = nn.ParameterList([torch.rand(4), torch.rand(4)])
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight


@pytest.mark.parametrize("make", [Tied, lambda: Tied().scales, lambda: nn.Sequential(nn.Linear(2, 3))])
def test_safetensors_of_a_module_loads_strictly(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module, again = make(), make()
    saved = {"model": module, "average": module}  # the same tensors under two parts
    Checkpoint(tmp_path / "c", saved, every=None).save(Engine(lambda engine, batch: None), wait=True)
    for part in saved:
        path = tmp_path / f"{part}.safetensors"
        export(find_entry(str(tmp_path / "c"), None), str(path), only=part)
        again.load_state_dict(pytest.importorskip("safetensors.torch").load_file(path), strict=True)
        assert same(dict(again.state_dict()), dict(module.state_dict()))


def test_keys_are_names_as_they_are(tmp_path: Path) -> None:
    state = {"part": {"a~b": torch.ones(1), "a/b": torch.zeros(1), 3: torch.ones(2), "4": np.arange(10**4)}}
    assert Store(str(tmp_path / "c")).save(1, state).wait()
    export(find_entry(str(tmp_path / "c"), None), str(tmp_path / "x.safetensors"), only="part")
    assert set(pytest.importorskip("safetensors.torch").load_file(tmp_path / "x.safetensors")) == {
        "a~b",
        "a/b",
        "3",
        "4",
    }


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    state = {"part": {3: torch.ones(1), "3": torch.zeros(1)}}
    assert Store(str(tmp_path / "c")).save(1, state).wait()
    with pytest.raises(CheckpointError, match=r"two tensors would have the name '3'; choose a \.pt file"):
        export(find_entry(str(tmp_path / "c"), None), str(tmp_path / "x.safetensors"), only="part")


@pytest.mark.parametrize(
    ("file", "only", "said"),
    [
        ("x.pt", "modle", "it has extra, model"),
        ("x.safetensors", "trainer", ".pt"),
    ],
)
def test_what_cannot_be_exported_is_refused(file: str, only: str, said: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        export(find_entry(str(folder), None), str(tmp_path / file), only)
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(("file", "said"), [("x.bin", "safetensors or .pt"), ("no/x.pt", "there is no folder")])
def test_a_path_that_cannot_be_exported_to_is_refused(file: str, said: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        export(find_entry(str(folder), None), str(tmp_path / file))


def test_a_damaged_checkpoint_is_not_exported(folder: Path, tmp_path: Path) -> None:
    flip(folder / "save-000001-step-3" / "rank_00000.safetensors", -1)
    with pytest.raises(DamagedCheckpointError, match="has changed"):
        export(find_entry(str(folder), None), str(tmp_path / "x.pt"))


def exported(module: nn.Module, tmp_path: Path, size: int | str) -> Path:
    Checkpoint(tmp_path / "c", {"model": module}, every=None).save(Engine(lambda engine, batch: None), wait=True)
    export(find_entry(str(tmp_path / "c"), None), f"{tmp_path / 'out'}/", max_shard_size=size)
    return tmp_path / "out"


def test_a_folder_has_files_of_a_size_and_an_index_as_the_hub_has_them(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    module = Tied()
    folder = exported(module, tmp_path, 100)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert files == [f"model-{at:05d}-of-{len(files):05d}.safetensors" for at in range(1, len(files) + 1)]
    assert sorted(each.name for each in folder.iterdir()) == [*files, "model.safetensors.index.json"]
    state = {name: value for name, value in module.state_dict().items() if name != "output.weight"}  # tied, once
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in state.values())
    for file in files:
        inside = safetensors.load_file(folder / file)
        assert inside.keys() == {name for name, of in index["weight_map"].items() if of == file}
        assert all(torch.equal(value, state[name]) for name, value in inside.items())
        assert len(inside) == 1 or sum(each.nbytes for each in inside.values()) <= 100


def test_a_folder_of_a_small_model_has_one_file_that_the_hubs_tools_load(tmp_path: Path) -> None:
    module, again = Tied(), Tied()
    folder = exported(module, tmp_path, "5GB")
    assert [each.name for each in folder.iterdir()] == ["model.safetensors"]
    pytest.importorskip("safetensors.torch").load_model(again, str(folder / "model.safetensors"))
    assert same(dict(again.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("size", ["5 gigabytes", 0, "-1GB", True])
def test_a_size_that_is_none_is_refused(size: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="max_shard_size is"):
        export(find_entry(str(folder), None), str(tmp_path / "x"), max_shard_size=size)


def test_a_folder_that_has_something_in_it_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(ArgumentError, match="it is there already; give a new folder"):
        export(find_entry(str(folder), None), str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match=r"no part 'net'; it has .*choose which by only="):
        export(find_entry(str(folder), None), str(tmp_path / "y"), only="net")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c", "x"]


@pytest.mark.parametrize("path", ["x.safetensors", pytest.param("x", marks=pytest.mark.nightly)])
def test_never_more_than_one_tensor_is_in_memory(path: str, tmp_path: Path) -> None:
    state = {"model": {str(at): torch.full((10 << 20,), float(at)) for at in range(4)}}  # of 40 MB each
    assert Store(str(tmp_path / "c")).save(1, state).wait()
    del state
    with Peak() as peak:
        export(find_entry(str(tmp_path / "c"), None), str(tmp_path / path), max_shard_size="100MB")
    assert peak.bytes < 110 << 20
