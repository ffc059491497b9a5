"""A rank killed in the middle of an epoch of data that is read ahead: what comes back is exact."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from allstep.testing import run_ranks
from tests.faults.streaming_job import train
from tests.jobs.running import run
from tests.regression import same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


ONCE = "rank=1,iteration=22,attempt=0,kill=9"
TWICE = "rank=1,iteration=8,attempt=0,kill=9;rank=0,iteration=22,attempt=1,kill=9"


@pytest.mark.parametrize(
    ("kind", "faults"),
    [
        pytest.param("own", ONCE, marks=pytest.mark.nightly),
        pytest.param("own", TWICE, marks=pytest.mark.nightly),
        pytest.param("none", TWICE, marks=pytest.mark.nightly),
    ],
    ids=["own", "own, twice", "none, twice"],
)
def test_a_killed_run_over_streams_of_unknown_length_equals_an_unbroken_one(
    kind: str, faults: str, tmp_path: Path
) -> None:
    options: list[str | Path] = ["--nproc", "2", "--name", "killed", "--max-restarts", "2", "--fault", faults]
    job = ["-m", "tests.faults.streaming_job", tmp_path / "killed", tmp_path / "killed.pt", kind]
    done = run(tmp_path, *options, *job, env=ENV)
    assert done.code == 0, done.err
    weights = torch.load(tmp_path / "killed.pt")
    expected = run_ranks(train, 2, str(tmp_path / "unbroken"), kind)[0]
    assert same(weights, expected)
    restarts = range(1, 2 + faults.count(";"))
    logs = [(tmp_path / f"runs/killed/attempt_{attempt}/rank_0.log").read_text() for attempt in restarts]
    began = [min(int(each) for each in re.findall(r"iteration (\d+)$", log, re.M)) for log in logs]
    assert 14 < began.pop() < 23  # within the second epoch, of 13 iterations
    assert all(1 < each < 9 for each in began)  # within the first
    assert ("are read and dropped" in done.err) is (kind == "none")
