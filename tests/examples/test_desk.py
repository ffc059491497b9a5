"""The language model of benchmarks/desk: few lines, and a kill costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.docs.pages import DOCS
from tests.jobs.launchers import ROOT, environment

DESK = ROOT / "benchmarks" / "desk"


def printed(*arguments: object) -> list[str]:
    command = [sys.executable, DESK / "compare.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_whole_job_takes_at_most_forty_lines_as_the_docs_say() -> None:
    names, *rows = printed("--features")
    assert names.split()[2:] == ["allstep", "ddp", "accelerate", "lightning", "ignite"]
    *features, (_, in_all) = [(row[:16].strip(), [int(each) for each in row[16:].split()]) for row in rows]
    assert in_all[0] <= 40
    page = (DOCS / "explanation" / "measurements.md").read_text()
    for name, lines in [*features, ("lines of code", in_all)]:
        [row] = [each for each in page.splitlines() if each.startswith(f"| {name}")]
        assert [int(each) for each in row.split("|")[2:-1]] == lines, name


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_job_ends_with_the_unbroken_ones_weights_and_series() -> None:
    pytest.importorskip("tensorboard")
    [*_, row] = printed("--only", "allstep", "--iterations", 120)
    assert row.split()[2:4] == ["equal", "equal"], row
