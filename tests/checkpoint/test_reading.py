"""What a reader does with files that somebody changed on purpose."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from allstep.checkpoint import Store
from allstep.checkpoint.storage import HASH_ALGORITHM, hash_bytes
from allstep.errors import CheckpointError
from tests.checkpoint.storages import some_state


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and let the manifest agree, as somebody would who means harm."""
    (folder / name).write_bytes(content)
    body = json.loads((folder / "manifest.json").read_text())["manifest"]
    body["files"][name] = {"size": len(content), "hash": hash_bytes(content)}
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    (folder / "manifest.json").write_text(json.dumps({"manifest": body, HASH_ALGORITHM: hash_bytes(text)}))


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name", ["rank_00000.safetensors", "rank_00000.json", "state.json", "manifest.json", ".metadata"]
)
def test_nothing_in_a_hostile_checkpoint_is_executed(name: str, tmp_path: Path) -> None:
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
