"""Fixtures of the situations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.situations.judge import Judge


@pytest.fixture(
    params=["warm", *(pytest.param(way, marks=pytest.mark.nightly) for way in ("python", "allstep", "torchrun"))]
)
def same_at_every_world_size(request: pytest.FixtureRequest, tmp_path: Path) -> Judge:
    """Calls a function on 1, 2 and 3 ranks and compares with one value; see `Judge`."""
    return Judge(request.param, tmp_path)
