"""A person debugs one of several ranks on the terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from allstep.cli.main import main
from allstep.launch.syntax_check import syntax_error
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


@pytest.mark.parametrize(
    ("begins", "is_said"),
    [
        ("import part", True),
        ("from package import part", True),
        ("from package.part import name", True),
        ("try:\n    import part\nexcept Exception:\n    pass", False),  # which the script may mean to catch
        ("import partly", False),
    ],
)
def test_a_syntax_error_in_a_file_beside_the_script_is_said_once_too(
    tmp_path: Path, begins: str, is_said: bool
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    for folder in (tmp_path, tmp_path / "package"):
        (folder / "part.py").write_text("name = (\n")
    script = tmp_path / "train.py"
    script.write_text(f"import sys\n{begins}\nprint('started')\n")
    error = syntax_error(str(script))
    assert (error is not None) == is_said
    if error is not None:
        assert str(error.filename).endswith("part.py")


def test_relative_imports_of_a_package_beside_the_script_are_followed(tmp_path: Path) -> None:
    inner = tmp_path / "package" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("from .inner import first\n")
    (inner / "__init__.py").write_text("")
    (inner / "first.py").write_text("from ..second import name\n")
    (tmp_path / "package" / "second.py").write_text("def broken(:\n")
    (tmp_path / "train.py").write_text("import package\n")
    error = syntax_error(str(tmp_path / "train.py"))
    assert error is not None
    assert str(error.filename).endswith("second.py")
