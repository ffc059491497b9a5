"""Devices for the tests of this folder, and the table that `./launch/test-gpu` prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when cuBLAS starts; without it a matrix product may differ from one run to the next.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

GPUS = torch.cuda.device_count()


def _devices(count: int) -> list[Any]:
    """CUDA where there are so many GPUs; else that is skipped with a reason. Without any the CPU stands in by night."""
    needs = f"needs {count} GPU{'s' if count > 1 else ''}, and this machine has {GPUS}; see ./launch/test-gpu"
    if count <= GPUS:
        return [pytest.param("cuda", id="cuda")]
    rehearsal = [] if GPUS else [pytest.param("cpu", id="rehearsal", marks=pytest.mark.nightly)]
    return [pytest.param("cuda", id="cuda", marks=pytest.mark.skip(reason=needs)), *rehearsal]


@pytest.fixture(params=_devices(1))
def device(request: pytest.FixtureRequest) -> torch.device:
    """One GPU, or the CPU in its place."""
    return torch.device(request.param)


@pytest.fixture(params=_devices(2))
def two_devices(request: pytest.FixtureRequest) -> str:
    """What `run_ranks` is given for two ranks that have a GPU each, or the CPU in their place."""
    return str(request.param)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, float, str], None]:
    """Notes a figure for the table: its name, value and unit."""

    def note(name: str, value: float, unit: str) -> None:
        record_property(name, f"{value:.4g} {unit}".rstrip())

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print each test with what came of it, its time and its figures, where `./launch/test-gpu` asks for it."""
    path = os.environ.get("ALLSTEP_GPU_TABLE")
    if not path:
        return
    rows = [
        (report.nodeid.rpartition("/")[2], outcome, f"{report.duration:.1f}", _figures(report))
        for outcome in ("passed", "failed", "skipped", "error")
        for report in terminalreporter.stats.get(outcome, ())
    ]
    name = torch.cuda.get_device_name() if GPUS else "no GPU"
    lines = [
        f"torch {torch.__version__}, {GPUS} x {name}",
        "",
        "| test | outcome | seconds | figures |",
        "| --- | --- | ---: | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    text = "\n".join(lines) + "\n"
    Path(path).write_text(text)
    terminalreporter.write(f"\n{text}\nThe table is in {path}.\n")


def _figures(report: Any) -> str:
    if report.outcome == "skipped":
        return str(report.longrepr[-1]).removeprefix("Skipped: ")
    return "; ".join(f"{name} {value}" for name, value in getattr(report, "user_properties", ()))
