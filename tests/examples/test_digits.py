"""The digits example trains under every launcher, and its accuracy does not depend on the number of ranks."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.examples.launching import ALONE, THREE_RANKS, TWO_RANKS, run, run_step_tasks

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
EXAMPLE = "digits.py"


def accuracy(printed: str) -> str:
    found = re.findall(r"test accuracy (\S+) on 360 samples", printed)
    assert len(found) == 1, printed
    return str(found[0])


def test_two_processes_learn(tmp_path: Path) -> None:
    printed = run(TWO_RANKS, EXAMPLE, "--epochs", 2, "--save", tmp_path / "weights.pt", folder=tmp_path)
    assert float(accuracy(printed)) >= 0.6
    assert (tmp_path / "weights.pt").is_file()


@pytest.mark.nightly
def test_two_processes_reach_97_percent_and_one_alone_measures_the_same(tmp_path: Path) -> None:
    weights, metrics = tmp_path / "weights.pt", tmp_path / "metrics.jsonl"
    printed = run(TWO_RANKS, EXAMPLE, "--save", weights, "--out", metrics, folder=tmp_path)
    assert float(accuracy(printed)) >= 0.97
    written = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [each["epoch"] for each in written] == list(range(1, 13))
    assert written[-1]["loss"] < written[0]["loss"]
    assert written[-1]["test_accuracy"] == float(accuracy(printed))

    alone = run(ALONE, EXAMPLE, "--evaluate", weights, folder=tmp_path)
    assert "1 rank(s) on cpu" in alone
    assert accuracy(alone) == accuracy(printed)


@pytest.mark.nightly
def test_three_ranks_measure_what_one_does(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    printed = run(ALONE, EXAMPLE, "--epochs", 1, "--save", weights, folder=tmp_path)
    assert accuracy(run(THREE_RANKS, EXAMPLE, "--evaluate", weights, folder=tmp_path)) == accuracy(printed)


@pytest.mark.nightly
def test_the_same_file_runs_alone_and_under_torchrun_and_in_a_slurm_step(tmp_path: Path) -> None:
    alone = run(ALONE, EXAMPLE, "--epochs", 1, folder=tmp_path)
    assert "1 rank(s) on cpu" in alone
    printed = {
        "torchrun": run(TORCHRUN, EXAMPLE, "--epochs", 1, folder=tmp_path),
        "step": run_step_tasks(EXAMPLE, "--epochs", 1, tasks=2, job=100_000 + os.getpid(), folder=tmp_path),
        "allstep": run(TWO_RANKS, EXAMPLE, "--epochs", 1, folder=tmp_path).replace("[0] ", ""),
    }
    results = {launcher: accuracy(text) for launcher, text in printed.items()}
    assert all("2 rank(s) on cpu" in text for text in printed.values()), printed
    assert len(set(results.values())) == 1, results
