"""The README's script is as short as it says and runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.launching import LIMIT, environment

README = Path(__file__).resolve().parents[2] / "README.md"


def the_script() -> str:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_script_has_at_most_25_lines() -> None:
    assert len([line for line in the_script().splitlines() if line.strip()]) <= 25


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="python", marks=pytest.mark.nightly),
        pytest.param(["-m", "allstep", "run", "--nproc", "2"], id="allstep run"),
    ],
)
def test_the_script_runs(launcher: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(the_script())
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.replace("[0] ", "").splitlines()
    assert [line.split()[0] for line in printed] == ["1", "2", "3"]
