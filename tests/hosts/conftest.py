from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.hosts import Hosts, HostsUnavailable, ensure_possible


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts, connected; each test has its own."""
    with opened_hosts(tmp_path) as made:
        yield made


@contextlib.contextmanager
def opened_hosts(folder: Path, own_name: str | None = None) -> Iterator[Hosts]:
    """Two hosts, connected; see `Hosts` for the arguments. The test is skipped where they cannot be made."""
    made = Hosts(folder, own_name)
    try:
        ensure_possible(os.environ)
        made.open()
    except HostsUnavailable as reason:
        pytest.skip(str(reason))
    try:
        yield made
    finally:
        made.close()
