"""`./launch/test-gpu` itself, on whatever machine this is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
def test_the_command_takes_the_python_at_hand_and_prints_a_table(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    environ = {**os.environ, "PYTHON": sys.executable, "ALLSTEP_GPU_TABLE": str(table)}
    chosen = ("tests/gpu/test_one_rank.py", "-k", "registered_memory")
    done = subprocess.run(
        [ROOT / "launch" / "test-gpu", *chosen], env=environ, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table.read_text().splitlines()
    assert any("test_registered_memory_takes_copies_and_is_given_back" in row and "| passed |" in row for row in rows)
    assert "| test | outcome | seconds | figures |" in done.stdout
