"""Real ranks save one checkpoint together, and any number of ranks reads it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from allstep.checkpoint import Store, entries
from allstep.checkpoint.manifest import MANIFEST
from allstep.checkpoint.storage import Buffer, FsspecStorage, LocalStorage
from allstep.errors import CheckpointError
from allstep.testing import RanksError, run_ranks
from allstep.world import World
from tests.checkpoint.folders import Failing, Gated, Unreadable, flip, same, some_state

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
    saved = run_ranks(save_sharded, 2, tmp_path, fresh=True)[0]
    rows = json.loads((tmp_path / "save-000001-step-1" / "state.json").read_text())["tensors"]["model/first.weight"]
    assert [chunk["sizes"] for chunk in rows["chunks"]] == [[7, 7], [6, 7]]
    for world_size in world_sizes:
        for loaded in run_ranks(load_sharded, world_size, tmp_path, fresh=True):
            assert same(loaded["model"], saved["model"])
            assert same(loaded["optimizer"]["state"], saved["optimizer"]["state"])


def test_sharded_state_is_whole_where_nothing_is_sharded(tmp_path: Path) -> None:
    saved = run_ranks(save_sharded, 3, tmp_path, fresh=True)[0]
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
    run_ranks(save_mesh, 4, tmp_path, fresh=True)
    index = json.loads((tmp_path / "save-000001-step-1" / "state.json").read_text())["tensors"]
    assert [len(record["chunks"]) for record in index.values()] == [2, 4, 4, 1]
    assert run_ranks(load_columns, 3, tmp_path, fresh=True) == [[True] * 4] * 3


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
    run_ranks(save_sharded, 2, tmp_path, fresh=True)
    for said in run_ranks(load_wrong_shape, 2, tmp_path, fresh=True):
        assert "rank 1" in said
        assert "shape [13, 7]" in said


def save_what_differs(world: World, folder: Path, how: str) -> str:
    store = Store(str(folder))
    state: dict[str, Any] = {"model": {"w": torch.zeros(3)}}
    own: Any = None
    if world.rank == 1:
        if how == "shape":
            state = {"model": {"w": torch.zeros(4)}}
        elif how == "unkeepable":
            own = {"fn": print}
    pending = store.save(1, state, own)
    assert not pending.wait()
    world.barrier()  # rank 0 has cleaned up when its own wait returns
    assert os.listdir(folder) == []
    world.barrier()
    assert store.save(2, {"model": {"w": torch.zeros(3)}}).wait()
    return str(pending.error)


@pytest.mark.parametrize(
    ("how", "said"),
    [("shape", "rank 1 has other tensors to save than rank 0 (model/w)"), ("unkeepable", "rank 1: UnkeepableError")],
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


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_the_checkpoint_before_is_whole(tmp_path: Path) -> None:
    for error, name in run_ranks(fail_on_rank_one, 2, tmp_path):
        assert "rank 1: OSError" in error
        assert "on fire" in error
        assert name == "save-000001-step-1"
    assert os.listdir(tmp_path) == ["save-000001-step-1"]


def fail_to_seal(world: World, folder: Path) -> str:
    def unable(*given: object) -> None:
        raise MemoryError("no room for the document")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allstep.checkpoint.commit._records", unable)
        pending = Store(str(folder)).save(1, some_state())
        assert not pending.wait()
    return str(pending.error)


def test_rank_0_that_cannot_make_the_document_fails_the_save_on_all(tmp_path: Path) -> None:
    for said in run_ranks(fail_to_seal, 2, tmp_path, timeout=60):
        assert "step 1 was not saved: MemoryError: no room for the document" in said


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
    found = Store("", storage=storage, patience=1.0 if looks > 1000 else 60.0).choose()
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


def test_a_manifest_that_rank_0_never_sees_and_others_do_sets_nothing_aside(tmp_path: Path) -> None:
    run_ranks(save_twice, 2, tmp_path)
    chosen = run_ranks(choose_half_blind, 2, tmp_path, 10**9, 0, MANIFEST)
    assert [name for name, _ in chosen] == ["save-000001-step-1"] * 2
    assert not (tmp_path / "save-000002-step-2" / "set_aside.json").exists()


def test_a_file_that_one_rank_never_sees_leads_all_to_the_checkpoint_before_and_nothing_is_set_aside(
    tmp_path: Path,
) -> None:
    run_ranks(save_twice, 2, tmp_path)
    for name, passed_over in run_ranks(choose_half_blind, 2, tmp_path, 10**9, 1):
        assert name == "save-000001-step-1"
        assert "rank 1 finds that rank_00000.safetensors is missing" in passed_over[0][1]
    assert not (tmp_path / "save-000002-step-2" / "set_aside.json").exists()


def choose_while_unreadable(world: World, folder: Path) -> str:
    times = 10**9 if world.rank == 1 else 0
    storage = Unreadable(str(folder), "save-000002-step-2", "rank_00001.json", times)  # of rank 1's share
    found = Store("", storage=storage, patience=0.2).choose()
    assert found is not None
    return found.name


def test_a_file_that_one_rank_cannot_read_leads_all_to_the_checkpoint_before_and_nothing_is_set_aside(
    tmp_path: Path,
) -> None:
    run_ranks(save_twice, 2, tmp_path)
    assert run_ranks(choose_while_unreadable, 2, tmp_path) == ["save-000001-step-1"] * 2
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
    assert run_ranks(choose_and_time, 2, tmp_path) == [("save-000001-step-1", True)] * 2
    assert os.listdir(tmp_path) == ["save-000001-step-1"]


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
    assert os.listdir(tmp_path) == []
