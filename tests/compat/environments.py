"""Environments of their own for tests that need another torch, or what stands beside one only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FREE_GB = 12
"""What a build of torch with CUDA takes on the disk, and room for pip to unpack it."""


def environment_with(folder: Path, first: Sequence[str], beside: Sequence[str] = ()) -> Path:
    """An environment with the allstep of this checkout; its Python. Skips where it cannot be made.

    Args:
        folder: an empty one.
        first: packages, torch among them; where pip finds none of these, that is the reason to skip.
        beside: further packages, which change none of the first.
    """
    if shutil.disk_usage(folder).free < FREE_GB * 10**9:
        pytest.skip(f"less than {FREE_GB} GB are free in {folder}, which {' and '.join(first)} may take")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    done = subprocess.run([*pip, *first], capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(f"{' and '.join(first)} cannot be installed here: {reasons[-1] if reasons else done.stderr[-300:]}")
    # The first are named again, so that nothing else that is installed changes them.
    subprocess.run([*pip, *first, *beside], check=True)
    return python
