"""Issue 13 E4: a path is what the kernel takes it for. `link/..` is the folder above the one that the link leads to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep import Alone, Checkpoint, Engine
from allstep.checkpoint import FsspecStorage, LocalStorage, Store
from allstep.cli import checkpoints_command
from allstep.handlers import Profiler
from allstep.outputs import Gather
from allstep.tracking import CSV, MLflow, TensorBoard, Track, WandB
from tests.checkpoint.storages import listed, some_state
from tests.outputs.predicting import gathered, predict


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `link/..` is in the current folder; by its text it would be the current folder itself."""
    (tmp_path / "elsewhere/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/inner")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "elsewhere"


def test_a_checkpoint_is_in_the_folder_that_the_kernel_takes_its_path_for(elsewhere: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    Checkpoint("link/../ck", {"engine": engine}, every=2).attach(engine)
    engine.run([0] * 3)
    assert listed(elsewhere / "ck") == ["save-000001-step-2", "save-000002-step-3"]
    assert not os.path.exists("ck")


@pytest.mark.parametrize("at", ["link/../ck", "link/../ck/save-000001-step-2", "link/../ck/inner/.."])
def test_a_run_resumes_from_where_the_kernel_takes_its_path_to(at: str, elsewhere: Path) -> None:
    assert Store(str(elsewhere / "ck")).save(2, some_state()).wait()
    (elsewhere / "ck/inner").symlink_to("save-000001-step-2")  # of which `..` is the folder of checkpoints
    found = Store("anywhere").choose(at)
    assert found is not None
    assert found.manifest.step == 2


def test_commands_look_where_the_kernel_does(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Store(str(elsewhere)).save(2, some_state()).wait()
    assert checkpoints_command.main(["ls", "link/.."]) == 0
    assert "save-000001-step-2" in capsys.readouterr().out
    assert checkpoints_command.main(["export", "link/..", "link/../model.pt"]) == 0
    assert (elsewhere / "model.pt").is_file()


def profile(path: str) -> None:
    engine = Engine(lambda engine, batch: torch.ones(2, 2).mm(torch.ones(2, 2)), coordinator=Alone())
    Profiler(path, range(1, 2), warm_up=0).attach(engine)
    engine.run([0] * 2)


def track(tools: Callable[[str], list[Any]], folder: str) -> None:
    engine = Engine(lambda engine, batch: {"loss": 0.5})
    with_tools = Track(folder, tools(folder), every=1, loss="loss").attach(engine)
    engine.run([0] * 2)
    with_tools.close()


WRITERS: dict[str, Callable[[str], object]] = {
    "an address of a local folder": lambda path: LocalStorage(path).make_folder("one"),
    "fsspec's local files": lambda path: FsspecStorage(f"local://{path}").make_folder("one"),
    "outputs": lambda path: gathered(Alone(), Gather("y", folder=path, limit=0), 3, shuffle=False, step=predict),
    "profiles": profile,
    "tracking": lambda path: track(lambda path: [CSV(f"{path}/table.csv")], path),
}
BY_NIGHT: dict[str, Callable[[str], object]] = {
    "TensorBoard": lambda path: track(lambda path: [TensorBoard()], path),
    "MLflow": lambda path: track(lambda path: [MLflow(uri=f"{path}/mlflow")], path),
    "wandb": lambda path: track(lambda path: [WandB("links", mode="offline")], path),
}


@pytest.mark.parametrize(
    "write",
    [
        *(pytest.param(write, id=name) for name, write in WRITERS.items()),
        *(pytest.param(write, id=name, marks=pytest.mark.nightly) for name, write in BY_NIGHT.items()),
    ],
)
def test_what_is_written_is_where_the_kernel_takes_its_path_to(
    write: Callable[[str], object], elsewhere: Path, tmp_path: Path
) -> None:
    write("link/../made")
    assert any((elsewhere / "made").iterdir())
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]


def test_a_relative_path_stays_the_same_folder_when_the_script_changes_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("ck")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    storage.make_folder("one")
    assert os.path.isdir(tmp_path / "ck/one")
