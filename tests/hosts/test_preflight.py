"""`allstep run --preflight` over several hosts, well and with faults in their network, disks and devices.

By night each fault is put in five times and healthy hosts are looked at fifty times; ALLSTEP_TIMES sets another number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.bridged import BridgedHosts
from tests.hosts.preflight_faults import (
    COUNT,
    FAULTS,
    is_named,
    is_well,
    limit_all,
    opened_hosts_of_a_preflight,
    rehearse,
    run_preflight,
)

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600)]


@pytest.fixture
def bridged(tmp_path: Path) -> Iterator[BridgedHosts]:
    with opened_hosts_of_a_preflight(tmp_path) as hosts:
        yield hosts


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_five_of_five(name: str, tmp_path: Path) -> None:
    for index in range(int(os.environ.get("ALLSTEP_TIMES", "5"))):
        seen = rehearse(FAULTS[name], tmp_path / f"hosts{index}")
        assert is_named(FAULTS[name], seen), seen.jobs[0].text


def test_nobody_is_named_among_healthy_hosts(bridged: BridgedHosts, tmp_path: Path) -> None:
    limit_all(bridged, "1gbit")
    for index in range(int(os.environ.get("ALLSTEP_TIMES", "50"))):
        seen = run_preflight(bridged, tmp_path / f"run{index}")
        assert is_well(seen), seen.jobs[0].text
        (line,) = seen.lines
        assert f"preflight: {COUNT} nodes, 28 pairs, {COUNT} devices, all fit" in line


def test_a_run_goes_on_without_an_ill_host(bridged: BridgedHosts, tmp_path: Path) -> None:
    fault = ("--fault", "rank=2,when=preflight,wrong_sums", "--exclude-ill", "1")
    jobs = run_preflight(bridged, tmp_path, *fault).jobs
    assert [job.code for job in jobs] == [0] * COUNT, jobs[0].text
    assert "preflight: going on without node 2" in jobs[0].err
    assert "trained" not in jobs[2].out
    assert sorted(line for job in jobs for line in job.out.splitlines()) == [f"[{rank}] trained" for rank in range(7)]
