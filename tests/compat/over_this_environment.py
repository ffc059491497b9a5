"""Environments for packages that are too large, or too particular, to be among what all tests need."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.jobs.launchers import ROOT


def installed(folder: Path, *requirements: str, free_gb: int = 1) -> Path:
    """The folder of programs of a new environment that has these, and sees the packages of this one besides.

    What this environment has is not installed again. The test is skipped where the packages cannot be had.
    """
    if shutil.disk_usage(folder).free < free_gb * 10**9:
        pytest.skip(f"less than {free_gb} GB are free in {folder}, which {' '.join(requirements)} may take")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # Not the path alone: what is installed for editing is named by files of this kind too.
    around = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"
    (own / "around.pth").write_text(f"{around}\n{ROOT / 'src'}\n")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-cache-dir", *requirements]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"{' '.join(requirements)} cannot be installed here: {done.stderr[-300:]}")
    assert not (own / "torch").exists(), "a second torch was installed"
    return folder / "bin"
