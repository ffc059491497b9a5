"""Issue 13 A10: a save that cannot work says so once, in words; a run that saved nothing does not end well."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import allstep
from allstep import Engine, Events
from allstep.checkpoint import Checkpoint, LocalStorage, Store, entries
from allstep.errors import CheckpointError
from allstep.testing import run_ranks
from allstep.world import World
from tests.checkpoint.storages import Failing, listed, some_state, states
from tests.jobs.launchers import ROOT, script
from tests.jobs.programs import SYSTEM_PATH, ProgramsUnavailable, ensure_programs
from tests.jobs.running import run


def test_a_run_of_which_nothing_was_saved_raises_at_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(lambda engine, batch: None)
    Checkpoint(Store("", storage=Failing(str(tmp_path), "state.json")), {"engine": engine}, every=1).attach(engine)
    completed: list[int] = []
    engine.add_event_handler(Events.COMPLETED, lambda: completed.append(engine.state.iteration))
    with pytest.raises(CheckpointError, match=r"nothing of this run was saved in .*the disk is on fire"):
        engine.run([0] * 5)
    assert completed == [5]  # it was trained to its end all the same
    told = [record.getMessage() for record in caplog.records if "was not saved" in record.getMessage()]
    assert sum("on fire" in each for each in told) == 1
    assert all("either, for the same reason" in each for each in told[1:])


def test_a_run_that_saved_something_ends_well_though_the_last_save_failed(tmp_path: Path) -> None:
    storage = Failing(str(tmp_path), "state.json")
    storage.failing = False
    engine = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint(Store("", storage=storage), {"engine": engine}, every=1).attach(engine)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def fill_the_disk() -> None:
        checkpoint.store.wait()
        storage.failing = True

    engine.run([0] * 5)
    assert len(entries(str(tmp_path))) >= 1


def train_on_separate_disks(world: World, folder: Path) -> str:
    engine = Engine(lambda engine, batch: None)
    Checkpoint(folder / str(world.rank), {"engine": engine}, every=2).attach(engine)
    with pytest.raises(CheckpointError) as raised:
        engine.run([0] * 5)
    assert engine.state.iteration == 5
    return str(raised.value)


@pytest.mark.slow
def test_a_disk_for_each_rank_is_said_in_words(tmp_path: Path) -> None:
    for said in run_ranks(train_on_separate_disks, 2, tmp_path):
        assert "rank 1: it does not see the folder that rank 0 made" in said
        assert "checkpoints need a folder that all ranks share" in said


def test_a_store_of_which_nothing_was_saved_raises_when_it_is_closed(tmp_path: Path) -> None:
    store = Store("", storage=Failing(str(tmp_path), "state.json"))
    assert not store.save(1, some_state()).wait()
    with pytest.raises(CheckpointError, match="nothing of this run was saved"):
        store.close()
    store.close()


def save_in_a_world(storage: LocalStorage) -> Store:
    with allstep.init():
        store = Store("", storage=storage)
        store.save(1, some_state())
    return store


def test_a_world_that_closes_with_nothing_saved_raises(tmp_path: Path) -> None:
    storage = Failing(str(tmp_path), "state.json")
    with pytest.raises(CheckpointError, match="nothing of this run was saved"):
        save_in_a_world(storage)
    storage.failing = False
    save_in_a_world(storage)
    assert list(states(tmp_path).values()) == ["whole"]


@pytest.fixture
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("mounted", ["nr_inodes=6"], indirect=True)
def test_a_disk_without_inodes_is_said_in_words(mounted: Path) -> None:
    pending = Store(str(mounted)).save(1, some_state())
    assert not pending.wait()
    assert "no inodes for new files" in str(pending.error)
    assert not [name for name in os.listdir(mounted) if "save" in name]


@pytest.mark.parametrize("mounted", ["ro"], indirect=True)
def test_a_disk_for_reading_only_is_said_in_words_at_the_start_and_at_the_end(
    mounted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint(mounted, {"engine": engine}, every=1).attach(engine)
    assert checkpoint.resume() is None
    assert "nothing can be saved in" in caplog.text
    with pytest.raises(CheckpointError, match="is mounted for reading only; choose another folder"):
        engine.run([0] * 3)


class Refusing(LocalStorage):
    """A file system that takes no more bytes, for a reason of the operating system's."""

    def __init__(self, root: str, reason: int) -> None:
        super().__init__(root)
        self.reason: int | None = reason

    def write(self, folder: str, name: str, blocks: Any) -> None:
        if self.reason is not None:
            raise OSError(self.reason, os.strerror(self.reason), name)
        super().write(folder, name, blocks)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (errno.EDQUOT, "the quota for {} is used up; free some of it, or keep fewer checkpoints"),
        (errno.EFBIG, "a file in {} would be larger than this process may write (ulimit -f)"),
    ],
    ids=["quota", "file size"],
)
def test_a_run_that_may_write_no_more_says_what_to_do(
    reason: int, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = words.format(tmp_path)
    storage = Refusing(str(tmp_path), reason)
    engine = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint(Store("", storage=storage), {"engine": engine}, every=1).attach(engine)
    with pytest.raises(CheckpointError) as raised:
        engine.run([0] * 5)
    assert words in str(raised.value)
    told = [record.getMessage() for record in caplog.records if record.name == "allstep.checkpoint"]
    assert [words in each for each in told].count(True) == 1  # at the first save that failed
    assert listed(tmp_path) == []
    storage.reason = None
    assert checkpoint.store.save(6, some_state()).wait()


@pytest.fixture
def with_quota(tmp_path: Path) -> Iterator[Path]:
    """A folder that may hold 20 MB of a larger disk: of btrfs, whose quotas are for root too."""
    try:
        ensure_programs(("mkfs.btrfs", "btrfs"), ("btrfs-progs",), os.environ)
    except ProgramsUnavailable as reason:
        pytest.skip(str(reason))
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(300 << 20)

    def call(*command: object) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PATH": SYSTEM_PATH}
        return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, check=False)

    for command in (["mkfs.btrfs", "-q", image], ["mount", "-o", "loop", image, disk]):
        if (made := call(*command)).returncode:
            pytest.skip(f"no btrfs can be made here: {made.stderr.strip()}")
    try:
        for command in (
            ["btrfs", "quota", "enable", disk],
            ["btrfs", "subvolume", "create", disk / "of_a_user"],
            ["btrfs", "qgroup", "limit", "20M", disk / "of_a_user"],
        ):
            assert call(*command).returncode == 0, command
        yield disk / "of_a_user"
    finally:
        call("umount", disk)


@pytest.mark.nightly
def test_a_quota_that_is_used_up_is_said_in_words(with_quota: Path) -> None:
    store = Store(str(with_quota))
    assert store.save(1, {"a": {"w": torch.zeros(100_000)}}).wait()
    pending = store.save(2, {"a": {"w": torch.rand(10_000_000)}})
    assert not pending.wait()
    assert f"the quota for {with_quota} is used up" in str(pending.error)
    assert list(states(with_quota).values()) == ["whole"]
    assert store.save(3, {"a": {"w": torch.zeros(100_000)}}).wait()


LIMITED = """
import resource, sys, torch
from allstep.checkpoint import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
pending = Store("c").save(1, {"a": {"w": torch.zeros(100_000)}})
pending.wait()
print(pending.error)
"""


@pytest.mark.nightly
def test_a_limit_of_file_sizes_is_said_in_words(tmp_path: Path) -> None:
    path = script(tmp_path, LIMITED)
    job = run(tmp_path, path, command=[sys.executable], env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"})
    assert "ulimit -f" in job.out


def test_a_file_system_that_counts_no_blocks_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statvfs = os.statvfs

    def without_blocks(path: Any) -> Any:
        fields = list(statvfs(path))
        fields[2:5] = 0, 0, 0
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", without_blocks)
    assert LocalStorage(str(tmp_path)).free_bytes() is None
    assert Store(str(tmp_path)).save(1, some_state()).wait()


@pytest.mark.parametrize("state", [{"__metadata__": torch.ones(3)}, {"__metadata__": {"a": 1}}])
def test_a_key_that_files_keep_for_themselves_is_refused(state: dict[str, Any], tmp_path: Path) -> None:
    pending = Store(str(tmp_path)).save(1, state)
    assert not pending.wait()
    assert "'__metadata__' cannot name a part of the state" in str(pending.error)
    deeper = Store(str(tmp_path / "deeper"))
    assert deeper.save(1, {"model": {"__metadata__": torch.ones(3)}}).wait()
    found = deeper.choose()
    assert found is not None
    assert deeper.load(found).state["model"]["__metadata__"].tolist() == [1.0] * 3
