"""Real ranks commit one save together: a failure of one is the failure of all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep.checkpoint import Buffer, FsspecStorage, LocalStorage, Store, entries
from allstep.errors import CheckpointError
from allstep.testing import RanksError, run_ranks
from allstep.world import World
from tests.checkpoint.storages import Failing, Gated, listed, some_state
from tests.regression import same

pytestmark = pytest.mark.slow


def save_what_differs(world: World, folder: Path, how: str) -> str:
    store = Store(str(folder))
    state: dict[str, Any] = {"model": {"w": torch.zeros(3)}}
    own: Any = None
    if world.rank == 1:
        if how == "shape":
            state = {"model": {"w": torch.zeros(4)}}
        elif how == "unsupported":
            own = {"fn": print}
    pending = store.save(1, state, own)
    assert not pending.wait()
    world.barrier()  # rank 0 has cleaned up when its own wait returns
    assert listed(folder) == []
    world.barrier()
    assert store.save(2, {"model": {"w": torch.zeros(3)}}).wait()
    return str(pending.error)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("shape", "rank 1 has other tensors to save than rank 0 (model/w)"),
        ("unsupported", "rank 1: UnsupportedStateError"),
    ],
)
def test_what_one_rank_cannot_save_is_saved_by_none_and_told_to_all(how: str, said: str, tmp_path: Path) -> None:
    for error in run_ranks(save_what_differs, 2, tmp_path, how):
        assert said in error


def fail_on_rank_one(world: World, folder: Path) -> list[str]:
    storage = Failing(str(folder), "rank_00001.safetensors")
    storage.failing = False
    store = Store("", storage=storage)
    assert store.save(1, some_state(1)).wait()
    storage.failing = True
    pending = store.save(2, some_state(2))
    assert not pending.wait()
    strict = Store("", storage=storage, strict=True)
    strict.save(3, some_state(3))
    with pytest.raises(CheckpointError, match="step 3"):
        strict.wait()
    found = store.choose()
    assert found is not None
    return [str(pending.error), found.name]


def test_a_rank_that_cannot_write_fails_the_save_on_all(tmp_path: Path) -> None:
    for error, name in run_ranks(fail_on_rank_one, 2, tmp_path):
        assert "rank 1: OSError" in error
        assert "on fire" in error
        assert name == "save-000001-step-1"
    assert listed(tmp_path) == ["save-000001-step-1"]


def fail_to_make_the_manifest(world: World, folder: Path) -> str:
    def unable(*given: object) -> None:
        raise MemoryError("not enough for the manifest")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allstep.checkpoint.commit.write_manifest", unable)
        pending = Store(str(folder)).save(1, some_state())
        assert not pending.wait()
    return str(pending.error)


def test_rank_0_that_cannot_make_the_manifest_fails_the_save_on_all(tmp_path: Path) -> None:
    for said in run_ranks(fail_to_make_the_manifest, 2, tmp_path, timeout=60):
        assert "step 1 was not saved: MemoryError: not enough for the manifest" in said


def skip_while_one_rank_writes(world: World, folder: Path) -> list[bool]:
    storage = Gated(str(folder)) if world.rank == 1 else LocalStorage(str(folder))
    store = Store("", storage=storage, busy="skip")
    first = store.save(1, some_state())
    second = store.save(2, some_state())
    if isinstance(storage, Gated):
        storage.gate.set()
    ended = first.wait()
    world.barrier()
    return [ended, second.skipped, store.save(3, some_state()).wait()]


def test_ranks_agree_on_what_is_left_out(tmp_path: Path) -> None:
    assert run_ranks(skip_while_one_rank_writes, 2, tmp_path) == [[True, True, True]] * 2
    assert len(entries(str(tmp_path))) == 2


def train_while_a_slow_rank_writes(world: World, folder: Path) -> tuple[bool, bool]:
    storage = Gated(str(folder)) if world.rank == 1 else LocalStorage(str(folder))
    store = Store("", storage=storage)
    pending = store.save(1, some_state())
    total = sum(world.all_reduce(torch.ones(1000))[0].item() for _ in range(200))
    under_way = not pending.done()
    if isinstance(storage, Gated):
        storage.gate.set()
    return pending.wait() and under_way, total == 200 * world.world_size


def test_training_goes_on_while_a_slow_rank_writes(tmp_path: Path) -> None:
    assert run_ranks(train_while_a_slow_rank_writes, 2, tmp_path) == [(True, True)] * 2


def choose_name(world: World, folder: Path) -> str:
    store = Store(str(folder))
    store.claim()
    found = store.choose()
    assert found is not None
    return found.name


class Fatal(LocalStorage):
    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_save(world: World, folder: Path, who: int) -> None:
    store = Store(str(folder))
    assert store.save(1, some_state(1)).wait()
    store = Store(str(folder), storage=Fatal(str(folder)) if world.rank == who else None)
    store.save(2, some_state(2))
    store.wait()
    signal.pause()


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before(who: int, tmp_path: Path) -> None:
    with pytest.raises(RanksError, match=f"rank {who} of 2 died with exit code -9"):
        run_ranks(die_in_a_save, 2, tmp_path, who)
    assert run_ranks(choose_name, 2, tmp_path) == ["save-000001-step-1"] * 2
    assert listed(tmp_path) == ["save-000001-step-1"]


def save_without_rename(world: World, folder: Path) -> tuple[bool, bool]:
    storage = FsspecStorage(f"local://{folder}")
    store = Store("", storage=storage)
    own = world.rank
    done = store.save(3, some_state(3), own).wait()
    found = store.choose()
    assert found is not None
    loaded = store.load(found)
    return done, same(loaded.state["model"], some_state(3)["model"]) and loaded.per_rank == [0, 1]


def test_ranks_commit_by_the_manifests_arrival_where_there_is_no_rename(tmp_path: Path) -> None:
    assert run_ranks(save_without_rename, 2, tmp_path) == [(True, True)] * 2


def save_from_separate_disks(world: World, folder: Path) -> str:
    pending = Store(str(folder / str(world.rank))).save(1, some_state())
    assert not pending.wait()
    return str(pending.error)


def test_a_folder_that_ranks_do_not_share_is_noticed(tmp_path: Path) -> None:
    for error in run_ranks(save_from_separate_disks, 2, tmp_path):
        assert "rank 1" in error


def save_once_more(world: World, folder: Path) -> str:
    store = Store(str(folder))
    if world.rank == 0:
        store.save(5, {"a": {"x": 1}})
    pending = store.save(10, {"a": {"x": 1}})
    pending.wait()
    if world.rank == 1:
        store.save(11, {"a": {"x": 1}}).wait()
    return str(pending.error)


def test_a_save_on_one_rank_alone_is_an_error_that_says_so(tmp_path: Path) -> None:
    said = run_ranks(save_once_more, 2, tmp_path)
    assert "rank 1: it saves save-000001-step-10, and rank 0 save-000001-step-5; call save on every rank" in said[1]
    assert listed(tmp_path) == []
