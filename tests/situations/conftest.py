"""Fixtures of the situations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.situations.judge import Judge

# A job for each world size, each of which imports torch on every rank: on a busy machine that is minutes.
_BY_NIGHT = (pytest.mark.nightly, pytest.mark.timeout(600))


@pytest.fixture(params=["warm", *(pytest.param(way, marks=_BY_NIGHT) for way in ("python", "allstep", "torchrun"))])
def same_at_every_world_size(request: pytest.FixtureRequest, tmp_path: Path) -> Judge:
    """Calls a function on 1, 2 and 3 ranks and compares with one value; see `Judge`."""
    return Judge(request.param, tmp_path)
