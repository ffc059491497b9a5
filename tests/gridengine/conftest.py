from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.gridengine.grid import Grid, ensure_installed
from tests.hosts.conftest import opened_bridge
from tests.jobs.programs import ProgramsUnavailable


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    """A running Grid Engine over two hosts."""
    try:
        ensure_installed(os.environ)
    except ProgramsUnavailable as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("grid")
    with opened_bridge(folder, 2) as hosts, Grid(folder, hosts) as running:
        yield running
