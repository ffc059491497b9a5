"""Which checkpoint a run of one rank resumes from: what was asked for, and the newest that verifies."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from allstep.checkpoint import LocalStorage, Store, find_entry, remove, verify
from allstep.checkpoint.selection import launches_of, overruled_resume, restarted_launches, resume_from
from allstep.checkpoint.storage import HASH_ALGORITHM, hash_bytes
from allstep.errors import CheckpointError
from tests.checkpoint.storages import (
    Unreadable,
    flip,
    newest,
    some_state,
    states,
    truncate,
)
from tests.regression import same


def test_an_empty_folder_has_nothing_to_resume_from(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).choose() is None


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00000.json", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [lambda path: flip(path, 20), lambda path: flip(path, -3), lambda path: truncate(path, 7), os.unlink]
)
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_it_used(
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
def test_a_file_that_cannot_be_read_is_tried_again_and_is_then_an_error(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    found = Store("", storage=Unreadable(str(tmp_path), "save-000002-step-2", name, 1), patience=0.2).choose()
    assert found is not None
    assert found.name == "save-000002-step-2"
    away = Store("", storage=Unreadable(str(tmp_path), "save-000002-step-2", name, 10**9), patience=0.2)
    with pytest.raises(CheckpointError, match=r"may be whole: .*the server is away.*--resume"):
        away.choose()
    named = away.choose(str(tmp_path / "save-000001-step-1"))  # whoever says so goes on without it
    assert named is not None
    assert set(states(tmp_path).values()) == {"whole"}


@pytest.mark.parametrize("reason", [errno.EACCES, errno.ESTALE])
def test_what_cannot_be_read_for_a_while_costs_no_checkpoint(reason: int, tmp_path: Path) -> None:
    store = Store(str(tmp_path), keep_last=2)
    for step in (1, 2):
        assert store.save(step, some_state(step)).wait()
    storage = Unreadable(str(tmp_path), "save-000002-step-2", "manifest.json", 10**9, reason)
    again = Store("", storage=storage, patience=0.2, keep_last=1)
    with pytest.raises(CheckpointError, match="may be whole"):
        again.resume()
    for step in (3, 4, 5):  # by a script that catches it and begins anew
        assert again.save(step, some_state(step)).wait()
    assert list(states(tmp_path)) == ["save-000001-step-1", "save-000002-step-2", "save-000005-step-5"]


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    class Unlistable(LocalStorage):
        def folders(self) -> list[str]:
            raise OSError(errno.ESTALE, "the server is away")

    assert Store(str(tmp_path)).save(1, some_state(1)).wait()
    with pytest.raises(CheckpointError, match=r"cannot use the checkpoints: .*the server is away"):
        Store("", storage=Unlistable(str(tmp_path)), patience=0.2).resume()


def test_a_checkpoint_that_was_given_another_name_is_still_one(tmp_path: Path) -> None:
    store = Store(str(tmp_path), keep_last=1)
    assert store.save(1, some_state(1)).wait()
    (tmp_path / "save-000001-step-1").rename(tmp_path / "best")
    for step in (2, 3):
        assert store.save(step, some_state(step)).wait()
    assert states(tmp_path) == {"best": "whole", "save-000003-step-3": "whole"}  # and retention leaves it alone
    found = store.choose(str(tmp_path / "best"))
    assert found is not None
    assert store.load(found).state["trainer"] == {"iteration": 1}
    newest_named = store.choose()
    assert newest_named is not None
    assert newest_named.name == "save-000003-step-3"
    best = find_entry(str(tmp_path), "best")
    assert verify(best) == []
    remove(best)
    assert list(states(tmp_path)) == ["save-000003-step-3"]


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


def test_the_last_saved_is_chosen_whatever_its_step(tmp_path: Path) -> None:
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


def test_a_named_checkpoint_that_is_damaged_or_missing_is_an_error(
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


def test_a_checkpoint_without_its_manifest_is_quarantined_not_removed(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("damaged", ["state.json", "rank_00000.json", "rank_00000.safetensors"])
def test_damage_that_only_reading_shows_leads_to_the_checkpoint_before(damaged: str, tmp_path: Path) -> None:
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
    path.write_text(json.dumps({"manifest": body, HASH_ALGORITHM: hash_bytes(text)}))
    with pytest.raises(CheckpointError, match="has format 99; this allstep reads up to 2, so use a newer one"):
        Store(str(tmp_path)).choose()
    assert not path.with_name("set_aside.json").exists()


@pytest.mark.parametrize(
    ("script", "command_line", "taken", "ignored"),
    [
        ("auto", None, "auto", None),
        ("auto", "", "auto", None),
        ("auto", "auto", "auto", None),
        ("auto", "none", "none", None),
        ("auto", "runs/a", "runs/a", None),
        ("runs/b", None, "runs/b", None),
        ("runs/b", "auto", "runs/b", None),
        ("runs/b", "runs/a", "runs/b", "runs/a"),
        ("runs/b", "none", "runs/b", "none"),
        ("none", "runs/a", "none", "runs/a"),
        ("none", "none", "none", None),
    ],
)
def test_what_the_script_names_wins_over_the_command_line(
    script: str, command_line: str | None, taken: str, ignored: str | None
) -> None:
    environ = {} if command_line is None else {"ALLSTEP_RESUME": command_line}
    assert resume_from(script, environ) == taken
    assert overruled_resume(script, environ) == ignored


@pytest.mark.parametrize(
    ("environ", "launches", "restarts"),
    [
        ({}, [], []),
        ({"ALLSTEP_LAUNCH": "ab", "TORCHELASTIC_RUN_ID": "exp"}, ["allstep-ab"], ["allstep-ab"]),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, [], []),
        ({"TORCHELASTIC_RUN_ID": "u", "TORCHELASTIC_RESTART_COUNT": "0"}, ["torchrun-u"], []),
        ({"TORCHELASTIC_RUN_ID": "u", "TORCHELASTIC_RESTART_COUNT": "1"}, ["torchrun-u"], ["torchrun-u"]),
        ({"SLURM_JOB_ID": "7"}, ["slurm-7"], []),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}, ["slurm-7"], []),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, ["slurm-7"], ["slurm-7"]),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "ALLSTEP_LAUNCH": "ab"},
            ["allstep-ab", "slurm-7"],
            ["allstep-ab", "slurm-7"],
        ),
    ],
)
def test_only_restarts_of_a_launch_are_the_same_run(
    environ: dict[str, str], launches: list[str], restarts: list[str]
) -> None:
    assert (launches_of(environ), restarted_launches(environ)) == (launches, restarts)
