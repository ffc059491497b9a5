"""How one rank commits a save: in which order it writes, and what a failure leaves."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep.checkpoint import LocalStorage, Store, entries
from allstep.checkpoint.manifest import is_temporary
from tests.checkpoint.storages import (
    Failing,
    Recording,
    listed,
    newest,
    some_state,
    states,
)


def test_the_manifest_is_written_last_and_a_rename_commits(tmp_path: Path) -> None:
    storage = Recording(str(tmp_path))
    assert Store("", storage=storage).save(1, some_state()).wait()
    writes = ["write rank_00000.safetensors", "write rank_00000.json", "write state.json"]
    assert storage.calls == ["make_folder", *writes, "sync_folder", "write manifest.json", "sync_folder", "rename"]


def test_files_and_folders_are_synchronised_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(old: Any, new: Any) -> None:
        synced.append("the rename")
        rename(old, new)

    store = Store(str(tmp_path))
    store.claim()
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", noted_rename)
    assert store.save(1, some_state()).wait()
    temporary = next(name for name in synced if name.startswith("tmp-"))
    files = ["rank_00000.safetensors", "rank_00000.json", "state.json"]
    assert synced == [*files, temporary, "manifest.json", temporary, "the rename", tmp_path.name]


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00000.json", "state.json", "manifest.json"])
def test_a_failed_save_is_reported_leaves_no_trace_and_the_next_one_works(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Failing(str(tmp_path), name)
    storage.failing = False
    store = Store("", storage=storage)
    assert store.save(1, some_state(1)).wait()
    storage.failing = True
    with caplog.at_level(logging.ERROR):
        pending = store.save(2, some_state(2))
        assert not pending.wait()
    assert "step 2 was not saved" in caplog.text
    assert "the disk is on fire" in str(pending.error)
    assert listed(tmp_path) == ["save-000001-step-1"]
    storage.failing = False
    assert store.save(3, some_state(3)).wait()
    assert newest(tmp_path)["trainer"] == {"iteration": 3}


def test_what_cannot_be_saved_fails_the_save_and_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    pending = store.save(1, {"model": {}, "scheduler": {"fn": lambda: None}})
    assert not pending.wait()
    assert "scheduler['fn'] is a function" in str(pending.error)
    assert listed(tmp_path) == []
    assert not store.save(2, {"a/b": 1}).wait()
    assert store.save(3, {"model": {"w": torch.ones(1)}}).wait()


def test_facts_that_json_cannot_hold_fail_the_save(tmp_path: Path) -> None:
    assert not Store(str(tmp_path)).save(1, some_state(), facts={"model": torch.nn.Linear(1, 1)}).wait()
    assert listed(tmp_path) == []


def test_a_disk_without_room_fails_the_save_before_anything_is_written(tmp_path: Path) -> None:
    class Full(Recording):
        def free_bytes(self) -> int:
            return 1000

    storage = Full(str(tmp_path))
    pending = Store("", storage=storage).save(1, some_state())
    assert not pending.wait()
    assert "free some space" in str(pending.error)
    assert not [call for call in storage.calls if call.startswith("write")]
    assert listed(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_while_writing_leaves_the_checkpoint_before(small_disk: Path) -> None:
    class Optimistic(LocalStorage):
        def free_bytes(self) -> None:
            return None

    store = Store("", storage=Optimistic(str(small_disk)))
    assert store.save(1, {"model": {"w": torch.ones(1 << 18)}}).wait()
    pending = store.save(2, {"model": {"w": torch.ones(1 << 20)}})
    assert not pending.wait()
    assert "No space left" in str(pending.error)
    assert listed(small_disk) == ["save-000001-step-1"]
    assert torch.equal(newest(small_disk)["model"]["w"], torch.ones(1 << 18))
    checked = Store(str(small_disk)).save(2, {"model": {"w": torch.ones(1 << 20)}})
    assert not checked.wait()
    assert "free some space" in str(checked.error)


class LateToSee(LocalStorage):
    """A network file system: the first `looks` at a save's files, of some seconds each, show what was there before."""

    def __init__(self, root: str, looks: int, seconds: float) -> None:
        super().__init__(root)
        self.looks, self.seconds = looks, seconds

    def files(self, folder: str) -> dict[str, int]:
        if is_temporary(folder) and self.looks > 0:
            self.looks -= 1
            time.sleep(self.seconds)
            return {}
        return super().files(folder)


@pytest.mark.parametrize(("looks", "seconds"), [(1, 0.3), (3, 0.0)], ids=["one long look", "several looks"])
def test_files_that_a_network_shows_late_are_looked_for_again(
    looks: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 13 D: one look over a slow network may take longer than all looks together have."""
    if seconds:
        monkeypatch.setattr("allstep.checkpoint.commit._LOOKS_S", seconds / 2)
    pending = Store("", storage=LateToSee(str(tmp_path), looks, seconds)).save(1, some_state())
    assert pending.wait(), pending.error


def test_a_file_that_nobody_ever_sees_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allstep.checkpoint.commit._LOOKS_S", 0.2)
    pending = Store("", storage=LateToSee(str(tmp_path), 10**6, 0.0)).save(1, some_state())
    assert not pending.wait()
    assert "rank 0 sees nothing of rank_00000.safetensors's" in str(pending.error)
    assert "checkpoints need a folder that all ranks share" in str(pending.error)


def test_retention_deletes_only_after_a_commit(tmp_path: Path) -> None:
    storage = Recording(str(tmp_path))
    store = Store("", storage=storage, keep_last=1)
    assert store.save(1, some_state()).wait()
    storage.calls.clear()
    assert store.save(2, some_state()).wait()
    assert storage.calls[-4:] == ["sync_folder", "rename", "rename", "remove tmp-save-000001-step-1-dead"]
    assert list(states(tmp_path)) == ["save-000002-step-2"]


def test_a_failed_save_deletes_nothing(tmp_path: Path) -> None:
    storage = Failing(str(tmp_path), "manifest.json")
    storage.failing = False
    store = Store("", storage=storage, keep_last=1)
    store.save(1, some_state())
    store.wait()
    storage.failing = True
    assert not store.save(2, some_state()).wait()
    assert list(states(tmp_path)) == ["save-000001-step-1"]


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    store = Store(str(tmp_path), keep_last=1, keep_best=(1, "accuracy", "max"))
    for step, accuracy in enumerate([0.5, 0.9, 0.6, 0.7], 1):
        assert store.save(step, some_state(), metrics={"accuracy": accuracy}).wait()
    assert [entry.manifest.step for entry in entries(str(tmp_path)) if entry.manifest] == [2, 4]


def test_a_checkpoint_of_that_name_is_never_written_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.claim()
    (tmp_path / "save-000001-step-1").mkdir()
    pending = store.save(1, some_state())
    assert not pending.wait()
    assert listed(tmp_path) == ["save-000001-step-1"]
