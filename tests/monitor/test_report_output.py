"""The report's file is whole, whatever happens to its writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from allstep.monitor.report_output import write_report
from tests.monitor.driving import wait_for


def test_the_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "failure.json"
    write_report(path, {"run": "first"})
    with pytest.raises(TypeError):
        write_report(path, {"run": object()})
    assert json.loads(path.read_text()) == {"run": "first"}
    assert os.listdir(tmp_path) == ["failure.json"]


def test_only_its_user_may_read_the_file(tmp_path):
    path = tmp_path / "failure.json"
    before = os.umask(0)
    try:
        write_report(path, {"run": "first"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_error_in_writing_the_file_is_the_one_that_is_raised(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        for path in tmp_path.iterdir():
            path.unlink()
        raise ValueError("the first error")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(ValueError, match="the first error"):
        write_report(tmp_path / "failure.json", {"run": "first"})


@pytest.mark.slow
def test_a_killed_writer_leaves_the_whole_file_or_the_one_before(tmp_path):
    path = tmp_path / "failure.json"
    write_report(path, {"run": "first"})
    code = (
        "import sys; from pathlib import Path; from allstep.monitor.report_output import write_report\n"
        "print('on', flush=True)\n"
        "while True: write_report(Path(sys.argv[1]), {'run': 'x' * 1_000_000})"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            wait_for(lambda: len(list(tmp_path.iterdir())) > 1)
            process.send_signal(signal.SIGKILL)
        assert json.loads(path.read_text())["run"] in ("first", "x" * 1_000_000)
