"""The core of the suite on the oldest and the newest torch that allstep supports, each in an environment of its own.

allstep uses a few names that torch and torchmetrics do not promise to keep (docs/architecture.md). A release that has
changed one shows here first. The oldest torch has the oldest torchmetrics beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(5400)]

REPOSITORY = Path(__file__).parents[2]
OLDEST, NEWEST = "2.9.1", "2.14.1"
OLDEST_TORCHMETRICS = "1.8.0"
"""Before it, states of Pearson's correlation lose a dimension with the first batch, and ranks cannot be compared."""
FREE_GB = 12
"""What a build of torch with CUDA takes on the disk, and room for pip to unpack it."""

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


def _install(folder: Path, version: str) -> Path:
    """An environment with this torch, the allstep of this checkout and what its tests import; its Python."""
    if shutil.disk_usage(folder).free < FREE_GB * 10**9:
        pytest.skip(f"less than {FREE_GB} GB are free in {folder}, which torch {version} may take")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    done = subprocess.run([*pip, f"torch=={version}"], capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(f"torch {version} cannot be installed here: {reasons[-1] if reasons else done.stderr[-300:]}")
    # torch is named again, so that nothing else that is installed changes it.
    beside = [f"torchmetrics=={OLDEST_TORCHMETRICS}"] if version == OLDEST else []
    subprocess.run([*pip, f"torch=={version}", *beside, f"{REPOSITORY}[examples]", *TEST_PACKAGES], check=True)
    return python


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_core_of_the_suite_passes_on_torch(version: str, tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    folder.mkdir()
    try:
        python = _install(folder, version)
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
