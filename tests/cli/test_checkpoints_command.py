"""`allstep checkpoints`: what it prints and what it exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allstep.checkpoint import Store
from allstep.cli.main import main
from tests.checkpoint.storages import listed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store(str(tmp_path / "c"))
    for step in (10, 20):
        assert store.save(
            step, {"model": {"w": torch.full((3,), float(step))}}, metrics={"accuracy": step / 100}
        ).wait()
    return tmp_path / "c"


def damage(folder: Path, name: str) -> None:
    path = folder / name / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_ls_shows_a_line_for_each_with_step_metrics_size_world_size_and_state(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tmp-save-000003-step-30-ab").mkdir()
    assert main(["checkpoints", "ls", str(folder)]) == 0
    heading, first, second, third = capsys.readouterr().out.splitlines()
    assert heading.split() == ["NAME", "STEP", "SIZE", "WORLD", "SAVED", "(UTC)", "STATE", "METRICS"]
    name, step, size, unit, world_size, *_ = first.split()
    assert (name, step, unit, world_size) == ("save-000001-step-10", "10", "B", "1")
    assert float(size) == sum(file.stat().st_size for file in (folder / name).iterdir() if file.name != "manifest.json")
    assert first.split()[-2:] == ["whole", "accuracy=0.1"]
    assert second.endswith("accuracy=0.2")
    assert third.endswith("unfinished")


def test_ls_as_json_has_all_that_the_manifests_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "ls", str(folder), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["manifest"]["step"] for entry in listed] == [10, 20]


def test_ls_says_when_a_file_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "save-000001-step-10" / "state.json").unlink()
    assert main(["checkpoints", "ls", str(folder)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_ls_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "ls", str(tmp_path)]) == 0
    assert "no checkpoints" in capsys.readouterr().out


def test_verify_reads_every_file_and_tells_what_is_damaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "verify", str(folder)]) == 0
    damage(folder, "save-000001-step-10")
    capsys.readouterr()
    assert main(["checkpoints", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "save-000001-step-10: damaged\n  rank_00000.safetensors has changed" in out
    assert "save-000002-step-20: whole" in out
    assert main(["checkpoints", "verify", str(folder), "save-000002-step-20"]) == 0


def test_ls_says_damaged_once_verify_has_found_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder, "save-000001-step-10")
    assert main(["checkpoints", "ls", str(folder)]) == 0  # its sizes are right
    assert main(["checkpoints", "verify", str(folder), "--size"]) == 0
    assert main(["checkpoints", "verify", str(folder)]) == 1
    capsys.readouterr()
    assert main(["checkpoints", "ls", str(folder)]) == 1
    _, first, second = capsys.readouterr().out.splitlines()
    assert "damaged" in first
    assert "whole" in second
    assert main(["checkpoints", "verify", str(folder), "--size"]) == 1
    assert Store(str(folder)).choose() is not None  # the other one


def test_verify_says_how_a_checkpoint_that_was_mended_is_used_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder, "save-000001-step-10")
    assert main(["checkpoints", "verify", str(folder)]) == 1
    damage(folder, "save-000001-step-10")  # flips the bit back
    capsys.readouterr()
    assert main(["checkpoints", "verify", str(folder)]) == 0
    assert "marked as damaged before, and no run uses it before set_aside.json is removed" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("ls", "verify"):
        assert main(["checkpoints", action, str(tmp_path / "nofolder")]) == 2
        assert "nofolder is no folder" in capsys.readouterr().err


def test_export_writes_the_newest_that_is_whole_or_the_one_named(folder: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "model.pt")
    assert main(["checkpoints", "export", str(folder), file, "--only", "model"]) == 0
    assert torch.load(file, weights_only=True)["w"].tolist() == [20.0] * 3
    assert main(["checkpoints", "export", str(folder), file, "--checkpoint", "save-000001-step-10"]) == 0
    assert torch.load(file, weights_only=True)["model"]["w"].tolist() == [10.0] * 3


def test_rm_removes_those_named_and_nothing_when_one_is_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", "rm", str(folder), "save-000001-step-10", "save-000009-step-9"]) == 2
    assert "has no checkpoint save-000009-step-9; there is save-000001-step-10, save" in capsys.readouterr().err
    assert main(["checkpoints", "rm", str(folder), "save-000001-step-10"]) == 0
    assert listed(folder) == ["save-000002-step-20"]


def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints"]) == 2
    assert main(["checkpoints", "mv", "x"]) == 2
    assert main(["checkpoints", "rm", "x"]) == 2


def test_listing_and_verifying_import_no_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "from allstep.cli.main import main\n"
        f"assert main(['checkpoints', 'ls', {str(folder)!r}]) == 0\n"
        f"assert main(['checkpoints', 'verify', {str(folder)!r}]) == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_file_in_place_of_a_folder_or_no_folder_is_an_error_and_no_damage(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main(["checkpoints", "ls", str(file)]) == 2
    assert "file is no folder" in capsys.readouterr().err
    assert main(["checkpoints", "export", str(folder), str(tmp_path / "none" / "x.pt")]) == 2
    assert "there is no folder" in capsys.readouterr().err
