"""`tests/xla` passes in an environment of its own, which `./launch/test-xla` makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(5400)]

REPOSITORY = Path(__file__).parents[2]


def test_xla_trains_over_the_runtime_for_the_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [REPOSITORY / "launch" / "test-xla", "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"XLA_VENV": str(tmp_path / "environment")},
        capture_output=True,
        text=True,
    )
    if "test-xla: skipped" in done.stderr:
        pytest.skip(done.stderr.strip().rpartition("\n")[2])
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
