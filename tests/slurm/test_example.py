"""The main example trains under a real srun."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.examples.launching import EXAMPLES
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]


@pytest.mark.nightly
def test_four_tasks_on_two_nodes_train_as_one_world(cluster: Cluster, tmp_path: Path) -> None:
    # The virtual nodes' names do not resolve: real nodes' do, and then MASTER_ADDR is not needed.
    environment = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    done = cluster.srun(
        "-N2",
        "--ntasks-per-node=2",
        f"--chdir={tmp_path}",
        sys.executable,
        str(EXAMPLES / "digits.py"),
        "--epochs=1",
        env=environment,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 rank(s) on cpu" in done.stdout
    assert done.stdout.count("on 360 samples") == 1
