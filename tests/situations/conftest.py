"""Fixtures of the situations."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from tests.situations.judge import Judge, Way

_LAUNCHERS: tuple[Way, ...] = ("allstep", "torchrun")

# A job for each world size, each of which imports torch on every rank: on a busy machine that is minutes.
_BY_NIGHT = (pytest.mark.nightly, pytest.mark.timeout(600))


@pytest.fixture(params=["warm", pytest.param("launched", marks=_BY_NIGHT)])
def same_at_every_world_size(request: pytest.FixtureRequest, tmp_path: Path) -> Judge:
    """Calls a function at several world sizes and compares with one value; see `Judge`."""
    if request.param == "warm":
        return Judge("warm", tmp_path)
    # Launchers take turns, always in the same way.
    return Judge(_LAUNCHERS[zlib.crc32(request.node.originalname.encode()) % len(_LAUNCHERS)], tmp_path)
