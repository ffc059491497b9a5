"""After any kill, each tool's series are those of an unbroken run: no step missing, none twice."""

from __future__ import annotations

import pytest

from allstep.errors import RanksError
from allstep.testing import run_ranks
from tests.tracking.job import EPOCHS, EVERY, LENGTH, READERS, lines, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def killed_and_resumed(folder, tools, ranks, delays):
    """Start the job again after each kill; how many of the starts were killed."""
    kills = 0
    for delay in [*delays, None]:
        try:
            run_ranks(train, ranks, str(folder), tools, delay, timeout=100)
        except RanksError:
            kills += 1
    return kills


def compare(tmp_path, tools, ranks, delays):
    run_ranks(train, ranks, str(tmp_path / "whole"), tools, timeout=100)
    kills = killed_and_resumed(tmp_path / "killed", tools, ranks, delays)
    for tool in ["jsonl", *tools]:
        assert READERS[tool](tmp_path / "killed") == READERS[tool](tmp_path / "whole"), tool
    return kills


@pytest.mark.parametrize("ranks", [1, 2])
def test_series_after_kills_are_those_of_an_unbroken_run(ranks, tmp_path):
    pytest.importorskip("tensorboard")
    assert compare(tmp_path, ["csv", "tensorboard"], ranks, [0.15, 0.25, 0.35][: 4 - ranks]) >= 1
    told = [line["step"] for line in lines(tmp_path / "whole") if "loss" in line]
    assert told == list(range(EVERY, EPOCHS * LENGTH + 1, EVERY))
