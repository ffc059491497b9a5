"""The language model of benchmarks/desk: few lines, and a kill costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.jobs.launchers import ROOT, environment

DESK = ROOT / "benchmarks" / "desk"


def printed(*arguments: object) -> list[str]:
    command = [sys.executable, DESK / "compare.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_whole_job_takes_at_most_forty_lines() -> None:
    [*_, in_all] = printed("--features", "--only", "allstep")
    assert int(in_all.split()[-1]) <= 40


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_job_ends_with_the_unbroken_ones_weights_and_series() -> None:
    pytest.importorskip("tensorboard")
    [*_, row] = printed("--only", "allstep", "--iterations", 120)
    assert row.split()[2:4] == ["equal", "equal"], row
