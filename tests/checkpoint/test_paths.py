"""A checkpoint's folder is the one that the kernel takes its path for."""

from __future__ import annotations

import os
from pathlib import Path

from allstep.checkpoint.storage import LocalStorage


def test_a_path_through_a_link_and_back_is_the_kernels(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "elsewhere/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/inner")
    monkeypatch.chdir(tmp_path)
    LocalStorage("link/../ck").make_folder("one")
    assert os.path.isdir(tmp_path / "elsewhere/ck/one")
    assert not os.path.exists(tmp_path / "ck")


def test_a_relative_path_stays_the_same_folder_when_the_script_changes_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("ck")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    storage.make_folder("one")
    assert os.path.isdir(tmp_path / "ck/one")
