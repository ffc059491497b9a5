"""The core of the suite on the oldest and the newest torch that allstep supports, each in an environment of its own.

allstep uses a few names that torch and torchmetrics do not promise to keep (docs/architecture.md). A release that has
changed one shows here first. The oldest torch has the oldest torchmetrics beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.compat.environments import REPOSITORY, environment_with

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(5400)]

OLDEST, NEWEST = "2.9.1", "2.14.1"
OLDEST_TORCHMETRICS = "1.8.0"
"""Before it, states of Pearson's correlation lose a dimension with the first batch, and ranks cannot be compared."""
TEST_PACKAGES = ("hypothesis", "psutil", "pytest", "pytest-timeout", "torchdata")
CORE = (
    "tests/coordination",
    "tests/data",
    "tests/engine",
    "tests/parallel",
    "tests/world",
    "tests/checkpoint/test_exactness.py",
    "tests/checkpoint/test_objects.py",
    "tests/checkpoint/test_objects_modules.py",
    "tests/checkpoint/test_torch_private.py",
    "tests/metrics/test_reduction.py",
    "tests/metrics/test_reference.py",
    "tests/metrics/test_saving.py",
    "tests/metrics/test_torchmetrics_private.py",
    "tests/monitor/test_torch_private.py",
    "tests/outputs/test_gather.py",
    "tests/planning/test_torch_private.py",
)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_core_of_the_suite_passes_on_torch(version: str, tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    folder.mkdir()
    try:
        older = [f"torchmetrics=={OLDEST_TORCHMETRICS}"] if version == OLDEST else []
        python = environment_with(folder, [f"torch=={version}"], [*older, f"{REPOSITORY}[examples]", *TEST_PACKAGES])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
        found = subprocess.run(
            [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
        )
        assert found.stdout.partition("+")[0].strip() == version
        options = ["-q", "-p", "no:cacheprovider", "-m", "not nightly and not slurm"]
        done = subprocess.run(
            [python, "-m", "pytest", *options, *CORE], cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes, which pytest would keep for three runs
