from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.hosts import Hosts, HostsUnavailable, ensure_possible


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts, connected; each test has its own."""
    made = Hosts(tmp_path)
    try:
        ensure_possible(os.environ)
        made.open()
    except HostsUnavailable as reason:
        pytest.skip(str(reason))
    yield made
    made.close()
