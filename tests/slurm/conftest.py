from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.jobs.programs import ProgramsUnavailable
from tests.slurm.cluster import Cluster, ensure_installed


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running SLURM cluster of two nodes; each pytest-xdist worker that asks has its own."""
    try:
        ensure_installed(os.environ)
    except ProgramsUnavailable as reason:
        pytest.skip(str(reason))
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as running:
        yield running
