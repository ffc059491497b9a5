"""Run folders: attempts are kept, names are free or chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from allstep.launch.folder import create_attempt
from allstep.run_record.run_folders import default_name


def test_a_chosen_name_gets_the_next_attempt_and_keeps_the_older_ones(tmp_path: Path) -> None:
    first = create_attempt(tmp_path / "runs", "exp", named=True)
    first.log(1).write_text("kept")
    second = create_attempt(tmp_path / "runs", "exp", named=True)
    assert (first.path, second.path) == (tmp_path / "runs/exp/attempt_0", tmp_path / "runs/exp/attempt_1")
    assert (first.attempt, second.attempt) == (0, 1)
    assert (tmp_path / "runs/exp/attempt_0/rank_1.log").read_text() == "kept"


def test_attempts_are_counted_as_numbers(tmp_path: Path) -> None:
    for number in (2, 10):
        (tmp_path / f"exp/attempt_{number}").mkdir(parents=True)
    (tmp_path / "exp/attempt_last").mkdir()
    assert create_attempt(tmp_path, "exp", named=True).attempt == 11


def test_a_name_that_was_made_up_is_made_free(tmp_path: Path) -> None:
    names = [create_attempt(tmp_path, "t-1", named=False).name for _ in range(3)]
    assert names == ["t-1", "t-1-2", "t-1-3"]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("train.py", "train-S"),
        ("/a/b/fit it.py", "fit-it-S"),
        ("package.train", "package-train-S"),
        ("folder/", "folder-S"),
        ("...", "run-S"),
    ],
)
def test_the_default_name_is_the_script_and_the_time(target: str, name: str) -> None:
    assert default_name(target, "S") == name
