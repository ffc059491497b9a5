"""A rank killed in the middle of an epoch of data that is read ahead: what comes back is exact."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from tests.checkpoint.training import equal
from tests.jobs.running import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("kind", ["own", pytest.param("none", marks=pytest.mark.nightly)])
def test_a_run_over_streams_of_unknown_length_that_is_killed_in_an_epoch_ends_like_an_unbroken_one(
    kind: str, tmp_path: Path
) -> None:
    def train(name: str, *options: str) -> tuple[str, list[torch.Tensor]]:
        job = ["-m", "tests.faults.streaming_job", tmp_path / name, tmp_path / f"{name}.pt", kind]
        done = run(tmp_path, "--nproc", "2", "--name", name, *options, *job, env=ENV)
        assert done.code == 0, done.err
        return done.err, torch.load(tmp_path / f"{name}.pt")

    faults = "rank=1,iteration=8,attempt=0,kill=9;rank=0,iteration=22,attempt=1,kill=9"
    said, weights = train("killed", "--max-restarts", "2", "--fault", faults)
    _, expected = train("unbroken")
    assert equal(weights, expected)
    logs = [(tmp_path / f"runs/killed/attempt_{attempt}/rank_0.log").read_text() for attempt in (1, 2)]
    began = [min(int(each) for each in re.findall(r"iteration (\d+)$", log, re.M)) for log in logs]
    assert 1 < began[0] < 9  # within the first epoch
    assert 14 < began[1] < 23  # within the second, of 13 iterations
    assert ("are read and dropped" in said) is (kind == "none")
