"""A person debugs one of several ranks on the terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from allstep.cli.main import main
from tests.jobs.launchers import ALLSTEP, environment, script

DEBUGGED = """
import sys
import allstep

with allstep.init() as world:
    secret = 40 + world.rank
    if world.rank == 1:
        breakpoint()
    print("sum", world.all_reduce(secret), flush=True)
"""


def talk(terminal: int, words: str, answer: str, heard: str = "") -> str:
    """Type a line and read until the answer has come."""
    if words:
        os.write(terminal, f"{words}\n".encode())
    while answer not in heard:
        heard += os.read(terminal, 4096).decode()
    return heard


@pytest.mark.slow
def test_the_rank_to_debug_has_the_terminal_and_the_other_waits(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*ALLSTEP, "run", "--nproc", "2", "--debug-rank", "1", str(script(tmp_path, DEBUGGED))]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        talk(ours, "", "(Pdb)")
        assert "41" in talk(ours, "p secret", "41")
        heard = talk(ours, "c", "sum 81")
        while heard.count("sum 81") < 2:
            heard += os.read(ours, 4096).decode()
        assert heard.count("[0]") == 1  # the debugged rank needs no mark
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_rank_that_is_not_there_cannot_be_debugged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(script(tmp_path, "pass"))
    assert main(["run", "--runs", str(tmp_path), "--nproc", "2", "--debug-rank", "2", path]) == 2
    assert "debug_rank is 2, and the ranks are 0 to 1" in capfd.readouterr().err


def test_a_syntax_error_is_said_once_and_nothing_is_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.py"
    path.write_text("print('started')\nfor each in (1, 2:\n    pass\n")
    assert main(["run", "--runs", str(tmp_path / "runs"), "--nproc", "3", str(path)]) == 2
    heard = capfd.readouterr()
    assert heard.err.count("SyntaxError") == 1
    assert "line 2" in heard.err
    assert "started" not in heard.out
    assert not (tmp_path / "runs").exists()
