"""What a store promises a run of one rank: what is saved comes back, one save at a time."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from allstep.checkpoint import Buffer, LocalStorage, Store, entries
from allstep.errors import ArgumentError, CheckpointError
from tests.checkpoint.storages import (
    Failing,
    Gated,
    listed,
    newest,
    some_state,
    states,
)
from tests.regression import same


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


class Leaving(LocalStorage):
    """Ends its thread, as sys.exit() in a library does."""

    def write(self, folder: str, name: str, blocks: Iterable[Buffer]) -> None:
        raise SystemExit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_whose_thread_does_not_finish_is_not_committed(tmp_path: Path) -> None:
    pending = Store("", storage=Leaving(str(tmp_path))).save(3, some_state())
    assert not pending.wait()
    assert "step 3 was not saved: its thread did not finish" in str(pending.error)
    assert listed(tmp_path) == []


def test_an_interpreter_that_ends_during_a_save_commits_it(tmp_path: Path) -> None:
    script = """
import sys, torch
from allstep.checkpoint import Store
Store(sys.argv[1]).save(1, {str(at): torch.zeros(3) for at in range(20_000)})
sys.exit(7)
"""
    ended = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 7
    assert "Traceback" not in ended.stderr
    assert list(states(tmp_path).values()) == ["whole"]


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


def test_a_strict_store_raises_the_failure_once(tmp_path: Path) -> None:
    storage = Failing(str(tmp_path), "state.json")
    store = Store("", storage=storage, strict=True)
    store.save(1, some_state())
    with pytest.raises(CheckpointError, match=r"step 1 was not saved.*on fire"):
        store.save(2, some_state())
    storage.failing = False
    assert store.save(3, some_state()).wait()


def test_claiming_a_folder_removes_what_is_unfinished_and_nothing_else(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert store.save(1, some_state()).wait()
    for dead in ("tmp-save-000002-step-2-abcd", "tmp-save-000003-step-3-abcd"):
        (tmp_path / dead).mkdir()
        (tmp_path / dead / "rank_00000.safetensors").write_bytes(b"half")
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    again = Store(str(tmp_path))
    assert again.choose() is not None
    assert len(listed(tmp_path)) == 5  # looking changes nothing
    again.claim()
    assert listed(tmp_path) == ["mine", "notes.txt", "save-000001-step-1"]
    assert again.save(4, some_state()).wait()
    assert (tmp_path / "save-000004-step-4").exists()  # orders are not used twice


class Immovable(LocalStorage):
    """Removes nothing, as in a folder that is mounted for reading."""

    def remove_folder(self, folder: str) -> None:
        raise PermissionError(13, "read-only file system")


def test_what_cannot_be_removed_keeps_nobody_from_resuming(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Store(str(tmp_path)).save(1, some_state()).wait()
    (tmp_path / "tmp-save-000002-step-2-abcd").mkdir()
    store = Store("", storage=Immovable(str(tmp_path)))
    store.claim()
    found = store.choose()
    assert found is not None
    assert found.name == "save-000001-step-1"
    assert "tmp-save-000002-step-2-abcd was left unfinished and cannot be removed: PermissionError" in caplog.text


@pytest.mark.parametrize("arguments", [{"verify": "maybe"}, {"busy": "queue"}, {"keep_last": 0}])
def test_settings_that_mean_nothing_are_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        Store(str(tmp_path), **arguments)
