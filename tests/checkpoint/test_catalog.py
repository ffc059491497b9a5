"""What a folder of checkpoints shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allstep.checkpoint import Store, entries
from allstep.checkpoint.storage import HASH_ALGORITHM, LocalStorage, hash_bytes
from allstep.errors import CheckpointError
from tests.checkpoint.storages import (
    Unreadable,
    some_state,
    states,
)


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
        json.dumps({**later, HASH_ALGORITHM: hash_bytes(canonical)})
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
