from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts.bridged import BridgedHosts
from tests.hosts.hosts import Hosts, HostsUnavailable, ensure_possible
from tests.jobs.programs import ProgramsUnavailable, ensure_programs


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


@contextlib.contextmanager
def opened_bridge(
    folder: Path, count: int, *, name: str = "host", domain: str = "", programs: Sequence[str] = ()
) -> Iterator[BridgedHosts]:
    """Hosts on a bridge, whose network `programs` are to change; skipped where there can be none."""
    folder.mkdir(exist_ok=True)
    made = BridgedHosts(folder, count, name=name, domain=domain)
    try:
        ensure_possible(os.environ)
        ensure_programs(programs, ("iproute2", "nftables"), os.environ)
        made.open()
    except (HostsUnavailable, ProgramsUnavailable) as reason:
        pytest.skip(str(reason))
    try:
        yield made
    finally:
        made.close()
