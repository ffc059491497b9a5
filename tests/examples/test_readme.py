"""The README's script is as short as it says and runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.launching import ALONE, TWO_RANKS, job_of
from tests.jobs.launchers import ROOT

README = ROOT / "README.md"


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
        pytest.param(ALONE, id="python", marks=pytest.mark.nightly),
        pytest.param(TWO_RANKS, id="allstep run"),
    ],
)
def test_the_script_runs(launcher: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(the_script())
    job = job_of(launcher, script, folder=tmp_path)
    assert job.code == 0, job.text
    printed = job.out.replace("[0] ", "").splitlines()
    assert [line.split()[0] for line in printed] == ["1", "2", "3"]
