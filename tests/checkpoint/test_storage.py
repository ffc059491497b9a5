"""Local storage is durable, addresses choose their storage, blocks are hashed on the way."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from allstep.checkpoint.storage import (
    BlockHasher,
    LocalStorage,
    hash_bytes,
    open_storage,
)
from allstep.errors import ArgumentError, CheckpointError


def test_every_new_folder_is_synchronised_in_the_one_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, own = os.fsync, threading.get_ident()

    def noting(descriptor: int) -> None:
        if threading.get_ident() == own:
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    LocalStorage(str(tmp_path / "one" / "two" / "three")).make_folder("save")
    assert set(synced) == {str(tmp_path), str(tmp_path / "one"), str(tmp_path / "one" / "two")}


def test_bytes_that_are_passed_on_in_blocks_have_the_hash_of_the_whole() -> None:
    data = bytes(range(256)) * 50_000
    hashed = BlockHasher()
    assert b"".join(map(bytes, hashed.blocks(data[:1000], data[1000:]))) == data
    assert (hashed.size, hashed.hexdigest) == (len(data), hash_bytes(data))


def test_an_address_chooses_its_storage(tmp_path: Any) -> None:
    assert isinstance(open_storage(str(tmp_path)), LocalStorage)
    assert open_storage(f"file://{tmp_path}").root == str(tmp_path)
    assert not open_storage("memory://x").has_rename
    with pytest.raises(CheckpointError, match="nosuch"):
        open_storage("nosuch://x")


def test_an_address_that_went_through_a_path_is_refused_and_not_a_local_folder() -> None:
    with pytest.raises(ArgumentError, match=r"s3:/bucket/run has lost a slash.*give s3://bucket/run as a str"):
        open_storage(str(Path("s3://bucket/run")))
