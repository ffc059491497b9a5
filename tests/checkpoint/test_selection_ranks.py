"""Real ranks choose one checkpoint together, where they see different files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from allstep.checkpoint import LocalStorage, Store
from allstep.checkpoint.manifest import MANIFEST
from allstep.errors import CheckpointError
from allstep.testing import run_ranks
from allstep.world import World
from tests.checkpoint.storages import Unreadable, flip, some_state

pytestmark = pytest.mark.slow


class Blind(LocalStorage):
    """Does not see a file, or the whole folder, until it has been looked for a few times."""

    def __init__(self, root: str, hidden: str, looks: int) -> None:
        super().__init__(root)
        self.hidden = hidden
        self.looks = looks

    def files(self, folder: str) -> dict[str, int]:
        found = super().files(folder)
        if folder.endswith("step-2") and self._looks_in_vain():
            return {name: size for name, size in found.items() if name != self.hidden and self.hidden}
        return found

    def folders(self) -> list[str]:
        return [name for name in super().folders() if self.hidden or self.looks < 0 or not name.endswith("step-2")]

    def _looks_in_vain(self) -> bool:
        self.looks -= 1
        return self.looks >= 0


def choose_half_blind(
    world: World, folder: Path, looks: int, blind: int, hidden: str = "rank_00000.safetensors"
) -> tuple[str, tuple[Any, ...]]:
    storage = Blind(str(folder), hidden, looks) if world.rank == blind else LocalStorage(str(folder))
    try:
        found = Store("", storage=storage, patience=1.0 if looks > 1000 else 60.0).choose()
    except CheckpointError as error:
        return str(error), ()
    assert found is not None
    return found.name, found.passed_over


def save_twice(world: World, folder: Path) -> None:
    store = Store(str(folder))
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()


@pytest.mark.parametrize("hidden", ["rank_00000.safetensors", MANIFEST, ""])
@pytest.mark.parametrize("blind", [0, 1])
def test_a_file_or_folder_that_appears_late_on_one_rank_is_waited_for(blind: int, hidden: str, tmp_path: Path) -> None:
    run_ranks(save_twice, 2, tmp_path)
    assert run_ranks(choose_half_blind, 2, tmp_path, 5, blind, hidden) == [("save-000002-step-2", ())] * 2
    assert not (tmp_path / "save-000002-step-2" / "set_aside.json").exists()


@pytest.mark.parametrize(
    ("blind", "hidden", "said"),
    [
        (0, MANIFEST, "there is no manifest.json"),
        (1, "rank_00000.safetensors", "rank 1 finds that rank_00000.safetensors is missing"),
    ],
)
def test_what_one_rank_never_sees_may_be_whole_and_is_an_error(
    blind: int, hidden: str, said: str, tmp_path: Path
) -> None:
    run_ranks(save_twice, 2, tmp_path)
    for error, _ in run_ranks(choose_half_blind, 2, tmp_path, 10**9, blind, hidden):
        assert "save-000002-step-2 cannot be read, and may be whole" in error
        assert hidden == MANIFEST or said in error
    assert not (tmp_path / "save-000002-step-2" / "set_aside.json").exists()


def choose_while_unreadable(world: World, folder: Path) -> None:
    times = 10**9 if world.rank == 1 else 0
    storage = Unreadable(str(folder), "save-000002-step-2", "rank_00001.json", times)  # of rank 1's share
    store = Store("", storage=storage, patience=0.2)
    with pytest.raises(CheckpointError, match=r"may be whole: rank 1 finds that rank_00001\.json cannot be read"):
        store.choose()
    named = store.choose(str(folder / "save-000001-step-1"))
    assert named is not None


def test_a_file_that_one_rank_cannot_read_is_an_error_on_all(tmp_path: Path) -> None:
    run_ranks(save_twice, 2, tmp_path)
    run_ranks(choose_while_unreadable, 2, tmp_path)
    assert not (tmp_path / "save-000002-step-2" / "set_aside.json").exists()


def choose_and_time(world: World, folder: Path) -> tuple[str, bool]:
    start = time.monotonic()
    found = Store(str(folder), patience=60.0).choose()
    assert found is not None
    return found.name, time.monotonic() - start < 30


@pytest.mark.parametrize("damaged", ["rank_00000.safetensors", "rank_00001.safetensors", "state.json", MANIFEST])
def test_damage_that_all_see_is_not_waited_for_and_all_take_the_one_before(damaged: str, tmp_path: Path) -> None:
    run_ranks(save_twice, 2, tmp_path)
    path = tmp_path / "save-000002-step-2" / damaged
    flip(path, len(path.read_bytes()) // 2)
    assert run_ranks(choose_and_time, 2, tmp_path) == [("save-000001-step-1", True)] * 2
