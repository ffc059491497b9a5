"""What a store promises a run of one rank: what is saved comes back, and nothing committed is lost."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep.checkpoint import Store, entries
from allstep.checkpoint.manifest import Name
from allstep.checkpoint.storage import ALGORITHM, LocalStorage, hash_bytes
from allstep.checkpoint.store import Pending
from allstep.errors import CheckpointError
from tests.checkpoint.folders import Failing, Gated, Recording, Unreadable, flip, same, some_state, truncate


def states(folder: Path) -> dict[str, str]:
    return {entry.name: entry.state for entry in entries(str(folder))}


def newest(folder: Path) -> dict[str, Any]:
    store = Store(str(folder))
    found = store.choose()
    assert found is not None
    return store.load(found).state


def test_what_was_saved_comes_back_with_its_per_rank_part_metrics_and_facts(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "new" / "folder"))
    own = {"generator": torch.get_rng_state(), "name": "rank 0"}
    assert store.save(10, some_state(), own, {"accuracy": 0.5}, {"config": {"lr": 0.1}}).wait()
    found = store.choose()
    assert found is not None
    loaded = store.load(found)
    assert same(loaded.state["model"], some_state()["model"])
    assert loaded.state["optimizer"]["param_groups"] == some_state()["optimizer"]["param_groups"]
    assert same(loaded.per_rank, [own])
    assert (loaded.manifest.step, loaded.manifest.world_size) == (10, 1)
    assert loaded.manifest.metrics == {"accuracy": 0.5}
    assert loaded.manifest.facts == {"config": {"lr": 0.1}}
    assert loaded.manifest.versions["torch"] == torch.__version__


def test_the_thread_that_writes_has_ended_when_the_save_has_been_waited_for(tmp_path: Path) -> None:
    saved = Store(str(tmp_path)).save(1, {f"{at}": torch.zeros(3) for at in range(5000)})
    assert [each for each in threading.enumerate() if each.name.startswith("allstep-save")]
    assert saved.wait()
    assert not [each for each in threading.enumerate() if each.name.startswith("allstep-save")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_whose_thread_does_not_finish_is_not_committed() -> None:
    pending = Pending(3, Name(1, 3), strict=False)
    pending.begin(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert not pending.wait()
    assert "step 3 was not saved: its thread did not finish" in str(pending.error)


def test_an_interpreter_that_ends_during_a_save_ends_well_and_the_save_is_committed(tmp_path: Path) -> None:
    script = """
import sys, torch
from allstep.checkpoint import Store
Store(sys.argv[1]).save(1, {str(at): torch.zeros(3) for at in range(20_000)})
sys.exit(7)
"""
    ended = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (7, "")
    assert list(states(tmp_path).values()) == ["whole"]


def test_an_empty_folder_has_nothing_to_resume_from(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).choose() is None


def test_a_model_and_its_optimizer_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = made()
    train(model, optimizer, range(5))
    store = Store(str(tmp_path))
    store.save(5, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(5, 10))  # while it is written
    store.wait()

    again, its_optimizer = made()
    state = newest(tmp_path)
    again.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    train(again, its_optimizer, range(5, 10))
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_the_manifest_is_written_last_and_a_rename_commits(tmp_path: Path) -> None:
    storage = Recording(str(tmp_path))
    assert Store("", storage=storage).save(1, some_state()).wait()
    writes = ["write rank_00000.safetensors", "write rank_00000.json", "write state.json"]
    assert storage.calls == ["make", *writes, "settle", "write manifest.json", "settle", "rename"]


def test_files_and_folders_are_synchronised_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(old: Any, new: Any) -> None:
        synced.append("the rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", noted_rename)
    assert Store(str(tmp_path)).save(1, some_state()).wait()
    temporary = next(name for name in synced if name.startswith("tmp-"))
    files = ["rank_00000.safetensors", "rank_00000.json", "state.json"]
    assert synced == [*files, temporary, "manifest.json", temporary, "the rename", tmp_path.name]


def test_every_folder_that_is_made_for_the_checkpoints_is_synchronised_in_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    LocalStorage(str(tmp_path / "one" / "two" / "three")).make("save")
    assert set(synced) == {str(tmp_path), str(tmp_path / "one"), str(tmp_path / "one" / "two")}


def test_what_changes_after_save_returned_is_not_in_it(tmp_path: Path) -> None:
    storage = Gated(str(tmp_path))
    state = some_state()
    pending = Store("", storage=storage).save(1, state)
    state["model"]["layer0.weight"].zero_()
    state["trainer"]["iteration"] = 99
    storage.gate.set()
    assert pending.wait()
    assert same(newest(tmp_path)["model"], some_state()["model"])
    assert newest(tmp_path)["trainer"] == {"iteration": 0}


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    storage = Gated(str(tmp_path))
    store = Store("", storage=storage)
    first = store.save(1, some_state(1))
    assert not first.done()
    second: list[Any] = []
    thread = threading.Thread(target=lambda: second.append(store.save(2, some_state(2))))
    thread.start()
    thread.join(0.2)
    assert not second  # still waiting
    storage.gate.set()
    thread.join(60)
    assert first.done()
    assert second[0].wait()
    assert len(states(tmp_path)) == 2


def test_a_second_save_is_left_out_where_the_store_says_so(tmp_path: Path) -> None:
    storage = Gated(str(tmp_path))
    store = Store("", storage=storage, busy="skip")
    first = store.save(1, some_state())
    second = store.save(2, some_state())
    assert second.skipped
    assert second.done()
    assert not second.wait()
    storage.gate.set()
    assert first.wait()
    assert store.save(3, some_state()).wait()
    assert [entry.manifest.step for entry in entries(str(tmp_path)) if entry.manifest] == [1, 3]


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
    assert os.listdir(tmp_path) == ["save-000001-step-1"]
    storage.failing = False
    assert store.save(3, some_state(3)).wait()
    assert newest(tmp_path)["trainer"] == {"iteration": 3}


def test_a_strict_store_raises_the_failure_once(tmp_path: Path) -> None:
    storage = Failing(str(tmp_path), "state.json")
    store = Store("", storage=storage, strict=True)
    store.save(1, some_state())
    with pytest.raises(CheckpointError, match=r"step 1 was not saved.*on fire"):
        store.save(2, some_state())
    storage.failing = False
    assert store.save(3, some_state()).wait()


def test_what_cannot_be_kept_fails_the_save_and_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    pending = store.save(1, {"model": {}, "scheduler": {"fn": lambda: None}})
    assert not pending.wait()
    assert "scheduler['fn'] is a function" in str(pending.error)
    assert os.listdir(tmp_path) == []
    assert not store.save(2, {"a/b": 1}).wait()
    assert store.save(3, {"model": {"w": torch.ones(1)}}).wait()


def test_facts_that_json_cannot_hold_fail_the_save(tmp_path: Path) -> None:
    assert not Store(str(tmp_path)).save(1, some_state(), facts={"model": torch.nn.Linear(1, 1)}).wait()
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_fails_the_save_before_anything_is_written(tmp_path: Path) -> None:
    class Full(Recording):
        def free(self) -> int:
            return 1000

    storage = Full(str(tmp_path))
    pending = Store("", storage=storage).save(1, some_state())
    assert not pending.wait()
    assert "make room" in str(pending.error)
    assert not [call for call in storage.calls if call.startswith("write")]
    assert os.listdir(tmp_path) == []


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
        def free(self) -> None:
            return None

    store = Store("", storage=Optimistic(str(small_disk)))
    assert store.save(1, {"model": {"w": torch.ones(1 << 18)}}).wait()
    pending = store.save(2, {"model": {"w": torch.ones(1 << 20)}})
    assert not pending.wait()
    assert "No space left" in str(pending.error)
    assert os.listdir(small_disk) == ["save-000001-step-1"]
    assert torch.equal(newest(small_disk)["model"]["w"], torch.ones(1 << 18))
    checked = Store(str(small_disk)).save(2, {"model": {"w": torch.ones(1 << 20)}})
    assert not checked.wait()
    assert "make room" in str(checked.error)


def test_retention_deletes_only_after_a_commit(tmp_path: Path) -> None:
    storage = Recording(str(tmp_path))
    store = Store("", storage=storage, keep_last=1)
    assert store.save(1, some_state()).wait()
    storage.calls.clear()
    assert store.save(2, some_state()).wait()
    assert storage.calls[-4:] == ["settle", "rename", "rename", "remove tmp-save-000001-step-1-dead"]
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


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00000.json", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [lambda path: flip(path, 20), lambda path: flip(path, -3), lambda path: truncate(path, 7), os.unlink]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    name: str, damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path))
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    damage(tmp_path / "save-000002-step-2" / name)
    found = store.choose()
    assert found is not None
    assert found.name == "save-000001-step-1"
    assert [name for name, _ in found.passed_over] == ["save-000002-step-2"]
    assert "save-000002-step-2 is passed over" in caplog.text
    assert same(store.load(found).state["model"], some_state(1)["model"])
    assert (tmp_path / "save-000002-step-2" / "set_aside.json").exists()
    again = store.choose()
    assert again is not None
    assert again.passed_over == ()  # it is not even looked at


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00000.json", "state.json", "manifest.json"])
def test_a_file_that_cannot_be_read_is_tried_again_and_then_passed_over_and_nothing_is_set_aside(
    name: str, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    for times, chosen in ((1, "save-000002-step-2"), (10**9, "save-000001-step-1")):
        storage = Unreadable(str(tmp_path), "save-000002-step-2", name, times)
        found = Store("", storage=storage, patience=0.2).choose()
        assert found is not None
        assert found.name == chosen
    assert "the server is away" in found.passed_over[0][1]
    assert set(states(tmp_path).values()) == {"whole"}


def test_verification_by_size_notices_truncation_and_not_a_flipped_bit(tmp_path: Path) -> None:
    store = Store(str(tmp_path), verify="size")
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    tensors = tmp_path / "save-000002-step-2" / "rank_00000.safetensors"
    flip(tensors, -1)
    found = store.choose()
    assert found is not None
    assert found.manifest.step == 2
    truncate(tensors, 1)
    found = store.choose()
    assert found is not None
    assert found.manifest.step == 1


def test_the_last_saved_is_chosen_whatever_its_step_and_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for seed, step in enumerate((1000, 500, 1000, 600)):
        assert store.save(step, some_state(seed)).wait()
    assert list(states(tmp_path)) == ["save-000002-step-500", "save-000003-step-1000", "save-000004-step-600"]
    assert newest(tmp_path)["trainer"] == {"iteration": 3}


def test_one_checkpoint_and_another_runs_folder_can_be_named(tmp_path: Path) -> None:
    other = Store(str(tmp_path / "other"))
    for step in (1, 2):
        assert other.save(step, some_state(step)).wait()
    store = Store(str(tmp_path / "mine"))
    one = store.choose(str(tmp_path / "other" / "save-000001-step-1") + "/")
    assert one is not None
    assert store.load(one).state["trainer"] == {"iteration": 1}
    whole = store.choose(str(tmp_path / "other"))
    assert whole is not None
    assert whole.manifest.step == 2


def test_a_named_checkpoint_that_is_damaged_or_missing_is_an_error_and_is_not_replaced_by_another(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    flip(tmp_path / "save-000002-step-2" / "state.json", 50)
    with pytest.raises(
        CheckpointError, match=r"save-000002-step-2 cannot be used: rank 0 finds that state\.json has changed"
    ):
        store.choose(str(tmp_path / "save-000002-step-2"))
    assert states(tmp_path)["save-000002-step-2"] == "whole"  # by size: it was not set aside
    with pytest.raises(CheckpointError, match=r"there is no manifest\.json"):
        store.choose(str(tmp_path / "save-000009-step-9"))
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        store.choose(str(tmp_path / "elsewhere"))


def test_opening_a_store_sweeps_away_what_dead_attempts_left_and_nothing_else(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert store.save(1, some_state()).wait()
    for dead in ("tmp-save-000002-step-2-abcd", "tmp-save-000003-step-3-abcd"):
        (tmp_path / dead).mkdir()
        (tmp_path / dead / "rank_00000.safetensors").write_bytes(b"half")
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    again = Store(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["mine", "notes.txt", "save-000001-step-1"]
    assert again.save(4, some_state()).wait()
    assert (tmp_path / "save-000004-step-4").exists()  # orders are not used twice


def test_a_checkpoint_that_has_lost_its_manifest_is_set_aside_and_not_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    newest = tmp_path / "save-000002-step-2"
    (newest / "manifest.json").unlink()
    found = Store(str(tmp_path)).choose()
    assert found is not None
    assert found.name == "save-000001-step-1"
    assert "no manifest.json" in json.loads((newest / "set_aside.json").read_text())["problem"]
    assert (newest / "rank_00000.safetensors").exists()


class Immovable(LocalStorage):
    """Removes nothing, as in a folder that is mounted for reading."""

    def remove(self, folder: str) -> None:
        raise PermissionError(13, "read-only file system")


def test_what_cannot_be_swept_away_keeps_nobody_from_resuming(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Store(str(tmp_path)).save(1, some_state()).wait()
    (tmp_path / "tmp-save-000002-step-2-abcd").mkdir()
    found = Store("", storage=Immovable(str(tmp_path))).choose()
    assert found is not None
    assert found.name == "save-000001-step-1"
    assert "tmp-save-000002-step-2-abcd was left unfinished and cannot be removed: PermissionError" in caplog.text


@pytest.mark.parametrize("damaged", ["state.json", "rank_00000.json", "rank_00000.safetensors"])
def test_damage_that_sizes_do_not_show_leads_to_the_checkpoint_before_where_reading_shows_it(
    damaged: str, tmp_path: Path
) -> None:
    store = Store(str(tmp_path), verify="size")
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    flip(tmp_path / "save-000002-step-2" / damaged, 12)
    resumed = store.resume()
    assert resumed is not None
    assert resumed[0].name == "save-000001-step-1"
    assert same(resumed[1].state, some_state(1) | {"optimizer": resumed[1].state["optimizer"]})
    assert (tmp_path / "save-000002-step-2" / "set_aside.json").exists()


def test_a_checkpoint_of_a_later_format_is_an_error_and_not_damage(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).save(1, some_state()).wait()
    path = tmp_path / "save-000001-step-1" / "manifest.json"
    body = json.loads(path.read_text())["manifest"] | {"format": 99}
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({"manifest": body, ALGORITHM: hash_bytes(text)}))
    with pytest.raises(CheckpointError, match="has format 99; this allstep reads 1, so use a newer one"):
        Store(str(tmp_path)).choose()
    assert not path.with_name("set_aside.json").exists()


def test_a_listing_tells_what_cannot_be_read_from_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    later = json.loads((tmp_path / "save-000001-step-1" / "manifest.json").read_text())
    later["manifest"]["format"] = 99
    canonical = json.dumps(later["manifest"], sort_keys=True, separators=(",", ":")).encode()
    (tmp_path / "save-000001-step-1" / "manifest.json").write_text(
        json.dumps({**later, ALGORITHM: hash_bytes(canonical)})
    )
    storage = Unreadable(str(tmp_path), "save-000002-step-2", "manifest.json", 1)
    monkeypatch.setattr("allstep.checkpoint.catalog.open_storage", lambda folder: storage)
    assert states(tmp_path) == {"save-000001-step-1": "later format", "save-000002-step-2": "unreadable"}
    assert states(tmp_path)["save-000002-step-2"] == "whole"


def test_a_folder_that_cannot_be_listed_is_an_error_of_allsteps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(self: LocalStorage) -> list[str]:
        raise LookupError("unable to locate credentials")

    monkeypatch.setattr(LocalStorage, "folders", unable)
    with pytest.raises(CheckpointError, match="cannot be read: LookupError: unable to locate credentials"):
        entries(str(tmp_path))


def test_a_checkpoint_of_that_name_is_never_written_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "save-000001-step-1").mkdir()
    pending = store.save(1, some_state())
    assert not pending.wait()
    assert os.listdir(tmp_path) == ["save-000001-step-1"]


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and let the manifest agree, as somebody would who means harm."""
    (folder / name).write_bytes(content)
    body = json.loads((folder / "manifest.json").read_text())["manifest"]
    body["files"][name] = {"size": len(content), "hash": hash_bytes(content)}
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    (folder / "manifest.json").write_text(json.dumps({"manifest": body, ALGORITHM: hash_bytes(text)}))


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name", ["rank_00000.safetensors", "rank_00000.json", "state.json", "manifest.json", ".metadata"]
)
def test_nothing_in_a_hostile_checkpoint_runs(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "checkpoints"))
    assert store.save(1, some_state()).wait()
    folder, marker = tmp_path / "checkpoints" / "save-000001-step-1", tmp_path / "ran"
    harm = pickle.dumps(Harm(marker))
    if name == "manifest.json":
        (folder / name).write_bytes(harm)
    else:
        rewrite(folder, name, harm)
    found = store.choose()
    if found is not None and name != ".metadata":
        with pytest.raises(CheckpointError, match="was not loaded"):
            store.load(found)
    assert not marker.exists()
    pickle.loads(harm)
    assert marker.exists()  # it would have


def test_a_document_that_points_to_other_tensors_or_sizes_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert store.save(1, some_state()).wait()
    folder = tmp_path / "save-000001-step-1"
    saved = json.loads((folder / "state.json").read_text())
    name, record = next(iter(saved["tensors"].items()))
    for change in ({"shape": [10**9, 5]}, {"dtype": "float64"}, {"dtype": "object"}, {"chunks": []}):
        hostile = {**saved, "tensors": {**saved["tensors"], name: record | change}}
        rewrite(folder, "state.json", json.dumps(hostile).encode())
        found = store.choose()
        assert found is not None
        with pytest.raises(CheckpointError, match="tensor model"):
            store.load(found)


@pytest.mark.parametrize("arguments", [{"verify": "maybe"}, {"busy": "queue"}, {"keep_last": 0}])
def test_settings_that_mean_nothing_are_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=next(iter(arguments))):
        Store(str(tmp_path), **arguments)
