"""After any kill, each tool's series are those of an unbroken run: no step missing, none twice."""

from __future__ import annotations

import os
import random

import pytest

from allstep.errors import RanksError
from allstep.testing import run_ranks
from tests.tracking.job import EPOCHS, EVERY, LENGTH, READERS, lines, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def killed_and_resumed(folder, tools, ranks, kills):
    """Start the job again after each kill; how many of the starts were killed."""
    struck = 0
    for kill in [*kills, None]:
        try:
            run_ranks(train, ranks, str(folder), tools, kill, timeout=100)
        except RanksError:
            struck += 1
    return struck


def compare(tmp_path, tools, ranks, kills):
    run_ranks(train, ranks, str(tmp_path / "whole"), tools, timeout=100)
    assert killed_and_resumed(tmp_path / "killed", tools, ranks, kills) == len(kills)
    assert (tmp_path / "killed" / "track" / "withdrawn.jsonl").exists()
    for tool in ["jsonl", *tools]:
        assert READERS[tool](tmp_path / "killed") == READERS[tool](tmp_path / "whole"), tool


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_series_after_kills_are_those_of_an_unbroken_run(ranks, tmp_path):
    pytest.importorskip("tensorboard")
    compare(tmp_path, ["csv", "tensorboard"], ranks, [(9, 0.02), (14, 0.0), (8, 0.03)][: 4 - ranks])
    told = [line["step"] for line in lines(tmp_path / "whole") if "loss" in line]
    assert told == list(range(EVERY, EPOCHS * LENGTH + 1, EVERY))


@pytest.mark.nightly
@pytest.mark.parametrize("tool", ["mlflow", "trackio"])
def test_runs_of_services_after_kills_are_those_of_an_unbroken_run(tool, tmp_path):
    pytest.importorskip(tool)
    compare(tmp_path, [tool], 2, [(9, 0.02), (14, 0.0), (8, 0.03)])


@pytest.mark.nightly
@pytest.mark.timeout(10_000)
def test_two_hundred_kills_at_random_moments(tmp_path):
    """The number by ALLSTEP_KILLS, 200 without; each job is killed until it comes to its end."""
    for tool in ("tensorboard", "mlflow", "trackio"):
        pytest.importorskip(tool)
    tools = ["csv", "tensorboard", "mlflow", "trackio"]
    draw = random.Random(0)
    whole = {}
    for ranks in (1, 2):  # whose sums differ in the last bits
        run_ranks(train, ranks, str(tmp_path / f"whole-{ranks}"), tools, timeout=100)
        whole[ranks] = {tool: READERS[tool](tmp_path / f"whole-{ranks}") for tool in ["jsonl", *tools]}
    kills = jobs = 0
    while kills < int(os.environ.get("ALLSTEP_KILLS", "200")):
        folder, ranks = tmp_path / str(jobs), 1 + jobs % 2
        moments = [(draw.randint(1, LENGTH), draw.uniform(0, 0.05)) for _ in range(4)]
        kills += killed_and_resumed(folder, tools, ranks, moments)
        jobs += 1
        for tool, series in whole[ranks].items():
            assert READERS[tool](folder) == series, (tool, jobs, kills)
