"""Files are whole whatever happens to their writer, and lines are read as far as they are whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from allstep.protocol.private_files import append_line, read_lines, write_private_json
from tests.monitor.driving import wait_for


def test_the_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "failure.json"
    write_private_json(path, {"run": "first"})
    with pytest.raises(TypeError):
        write_private_json(path, {"run": object()})
    assert json.loads(path.read_text()) == {"run": "first"}
    assert os.listdir(tmp_path) == ["failure.json"]


def test_only_its_user_may_read_the_file(tmp_path):
    path = tmp_path / "failure.json"
    before = os.umask(0)
    try:
        write_private_json(path, {"run": "first"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_error_in_writing_the_file_is_the_one_that_is_raised(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        for path in tmp_path.iterdir():
            path.unlink()
        raise ValueError("the first error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="the first error"):
        write_private_json(tmp_path / "failure.json", {"run": "first"})


@pytest.mark.slow
def test_a_killed_writer_leaves_the_whole_file_or_the_one_before(tmp_path):
    path = tmp_path / "failure.json"
    write_private_json(path, {"run": "first"})
    code = (
        "import sys; from pathlib import Path; from allstep.protocol.private_files import write_private_json\n"
        "print('on', flush=True)\n"
        "while True: write_private_json(Path(sys.argv[1]), {'run': 'x' * 1_000_000})"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            wait_for(lambda: len(list(tmp_path.iterdir())) > 1)
            process.send_signal(signal.SIGKILL)
        assert json.loads(path.read_text())["run"] in ("first", "x" * 1_000_000)


def test_lines_are_read_as_far_as_they_are_whole(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"at": 1})
    append_line(path, {"at": 2})
    with path.open("ab") as file:
        file.write(b'{"at": 3, "wo')  # as a kill, or a full disk, leaves it
    assert [each["at"] for each in read_lines(path)] == [1, 2]
    length = append_line(path, {"at": 4})
    assert [each["at"] for each in read_lines(path)] == [1, 2, 4]
    assert length == path.stat().st_size


def test_what_is_no_mapping_is_left_out_and_no_file_has_no_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'7\n\xff\n[]\n{"at": 1}\n')
    assert read_lines(path) == [{"at": 1}]
    assert read_lines(tmp_path / "none") == []
