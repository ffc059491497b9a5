"""Failures of a device under `allstep run`: the report's first cause. And processes that share one GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allstep.testing import run_ranks
from allstep.world import World

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).with_name("scripts")


def launched(
    folder: Path, *arguments: str, device: torch.device, nproc: int = 1, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder under `allstep run`."""
    environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    if device.type != "cuda":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "allstep", "run", "--nproc", str(nproc), "--name", "job", "--limits", "step=5"]
    command += [*options, str(SCRIPTS / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=110, check=False)


def cause(folder: Path) -> dict[str, Any]:
    """The first cause that the report names."""
    found: dict[str, Any] = json.loads((folder / "runs/job/attempt_0/failure.json").read_text())["cause"]
    return found


@pytest.mark.parametrize(
    ("kind", "judged", "says"),
    [
        ("memory", "error", ("out of memory", "can't allocate memory", "not enough memory", "invalid")),
        ("assertion", "error", ("device-side assert",)),
        ("sleep", "hang", ("section step",)),
    ],
)
def test_the_report_names_what_failed_on_the_device(device, tmp_path: Path, kind: str, judged: str, says):
    job = launched(tmp_path, "fails_on_device.py", kind, device=device)
    assert job.returncode != 0, job.stderr
    found = cause(tmp_path)
    assert found["kind"] == judged, job.stderr
    assert found["iteration"] == 3
    assert any(each in found["what"] for each in says), found["what"]


def test_an_import_that_starts_the_device_is_not_shared_by_forking(device, tmp_path: Path):
    job = launched(tmp_path, "imports_the_device.py", device=device, nproc=2)
    assert job.returncode == 0, job.stderr
    assert "rank 0 has 2" in job.stdout
    assert "rank 1 has 4" in job.stdout


def trains(world: World) -> tuple[str, list[float]]:
    torch.manual_seed(world.rank)
    model = world.wrap(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4, device=world.device)).square().mean().backward()
        optimizer.step()
    total = world.all_reduce(torch.ones(2, device=world.device))
    assert total.tolist() == [2.0, 2.0]
    return str(world.backend), [each for part in model.parameters() for each in part.detach().flatten().tolist()]


def test_two_ranks_share_one_gpu_over_gloo(device):
    (backend, first), (_, second) = run_ranks(trains, 2, device=device.type, timeout=100)
    assert backend == "gloo" or torch.cuda.device_count() > 1
    assert first == second
