"""A manifest is believed only when every byte of it is as it was written; names are read back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from allstep.checkpoint.manifest import (
    CheckpointName,
    FileRecord,
    Manifest,
    is_temporary,
    next_order,
    read_manifest,
    read_name,
    write_manifest,
)
from allstep.checkpoint.storage import HASH_ALGORITHM, hash_bytes
from allstep.errors import DamagedCheckpointError

MANIFEST = Manifest(
    format=1,
    order=3,
    step=100,
    world_size=2,
    created=1.5e9 + 0.1,
    versions={"torch": "2"},
    metrics={"loss": 0.1, "bad": math.nan, "worse": math.inf},
    facts={"lr": 1e-3, "nested": [1, None, {"a": True}]},
    files={"state.json": FileRecord(size=5, hash="0" * 32)},
)


def forged(**changes: Any) -> bytes:
    """A manifest with other fields, and the hash that belongs to them."""
    body = json.loads(write_manifest(MANIFEST))["manifest"] | changes
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({"manifest": body, HASH_ALGORITHM: hash_bytes(text)}).encode()


def test_what_is_written_is_read() -> None:
    read = read_manifest(write_manifest(MANIFEST))
    assert repr(read) == repr(MANIFEST)


def test_its_text_is_json_for_any_reader() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(write_manifest(MANIFEST), parse_constant=refuse)


def test_no_byte_can_be_changed_unnoticed() -> None:
    text = write_manifest(MANIFEST)
    whole = read_manifest(text)
    for at in range(len(text)):
        changed = bytearray(text)
        changed[at] ^= 1
        try:
            assert read_manifest(bytes(changed)) == whole or repr(read_manifest(bytes(changed))) == repr(whole), at
        except DamagedCheckpointError:
            continue


@pytest.mark.parametrize("length", [0, 1, 50, 300])
def test_a_truncated_one_is_refused(length: int) -> None:
    with pytest.raises(DamagedCheckpointError):
        read_manifest(write_manifest(MANIFEST)[:length])


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", ".hidden", "..", "", "a\nb", "a\\..\\b", "x" * 300]
)
def test_a_file_outside_the_folder_is_refused(name: str) -> None:
    with pytest.raises(DamagedCheckpointError):
        read_manifest(forged(files={name: {"size": 1, "hash": "0" * 32}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"world_size": 0},
        {"step": "many"},
        {"metrics": {"a": "high"}},
        {"files": {"a": {"size": -1, "hash": "0" * 32}}},
        {"files": {"a": {"size": 1, "hash": "short"}}},
        {"unknown": 1},
        {"format": 3},
    ],
)
def test_a_field_of_another_kind_is_refused(changes: dict[str, Any]) -> None:
    read_manifest(forged())
    with pytest.raises(DamagedCheckpointError):
        read_manifest(forged(**changes))


def test_text_of_no_manifest_is_refused() -> None:
    for text in (b"null", b"[]", b"{}", b'{"manifest": 5, "xxh3_128": 1}', b"[" * 100_000, b"\x80\x04."):
        with pytest.raises(DamagedCheckpointError):
            read_manifest(text)


def test_names_are_read_back_and_others_are_left_alone() -> None:
    name = CheckpointName(7, 1234)
    assert read_name(str(name)) == name
    assert is_temporary(name.temporary("0af"))
    for other in (name.temporary("0af"), "save-7-step-1", "save-0000007-step-1", "models", "save-000007-step-1.bak"):
        assert read_name(other) is None
    assert not is_temporary(str(name))
    assert not is_temporary("tmp-of-mine")


def test_an_order_is_never_given_twice() -> None:
    assert next_order([]) == 1
    assert next_order(["save-000002-step-50", "tmp-save-000009-step-5-0af", "other"]) == 10


def test_the_newest_is_the_last_saved_and_not_the_one_of_the_highest_step() -> None:
    assert max(CheckpointName(1, 1000), CheckpointName(2, 600)) == CheckpointName(2, 600)
