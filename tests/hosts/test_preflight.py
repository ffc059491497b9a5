"""`allstep run --preflight` over several hosts, well and with faults in their network, disks and devices.

By night each fault is put in five times and healthy hosts are looked at fifty times; ALLSTEP_TIMES sets another number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.hosts.bridged import BridgedHosts
from tests.hosts.conftest import opened_bridge
from tests.jobs.job import Job
from tests.jobs.launchers import script

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600)]

COUNT = 8


@dataclass(frozen=True)
class Trouble:
    """A fault: what is done to hosts, and the line in which it is named."""

    words: str
    make: Callable[[BridgedHosts], object] = lambda hosts: None
    options: tuple[str, ...] = ()
    first: Mapping[int, str] = field(default_factory=dict)


def on_all(hosts: BridgedHosts, rate: str) -> None:
    for host in range(COUNT):
        hosts.limit_rate(host, rate)


def tenth_of_the_rate(hosts: BridgedHosts) -> None:
    on_all(hosts, "400mbit")
    hosts.limit_rate(5, "40mbit")


def only_from(host: int, other: int, what: str) -> Callable[[BridgedHosts], None]:
    return lambda hosts: hosts.filter(host, f"ip saddr {hosts.addresses[other]} {what}")


TROUBLES = {
    "a link at a tenth of the rate": Trouble(
        r"ill: node 5 \(host5\): its links to nodes .* are ill: .*/s, where the others have", tenth_of_the_rate
    ),
    "a lossy link between two": Trouble(
        r"ill: between node 2 \(host2\) and node 6 \(host6\): \d+% of the packets are lost|"
        r"ill: between node 2 \(host2\) and node 6 \(host6\): .*(/s, where|round trip)",
        only_from(6, 2, "meta length > 200 numgen random mod 100 < 10 drop"),
    ),
    "a blocked port": Trouble(
        r"ill: node 3 \(host3\): its links to nodes .* are ill: .*does not answer",
        lambda hosts: hosts.filter(3, "tcp flags & (syn|ack) == syn drop"),
    ),
    "a pair that cannot talk": Trouble(
        r"ill: between node 1 \(host1\) and node 4 \(host4\): .*does not answer", only_from(4, 1, "drop")
    ),
    "a wrong host name": Trouble(
        r"ill: node 2 \(host2\): host name: host2 resolves to 10.99.0.1, which is no address of this machine",
        lambda hosts: hosts.rename(2, "10.99.0.1"),
    ),
    "a clock a minute off": Trouble(
        r"ill: node 7 \(host7\): its clock is \d\d s ahead of the others'",
        options=("--fault", "rank=7,clock=60"),
    ),
    "a full disk": Trouble(
        r"ill: node 4 \(host4\): folder: .*has 1 MiB free",
        first={4: "mkdir runs; mount -t tmpfs -o size=1m tmpfs runs"},
    ),
    "a device whose sums are wrong": Trouble(
        r"ill: node 6 \(host6\): device 0 \(cpu\): it computes wrong sums",
        options=("--fault", "rank=6,when=preflight,wrong_sums"),
    ),
}


def opened(folder: Path) -> AbstractContextManager[BridgedHosts]:
    return opened_bridge(folder, COUNT, programs=("tc", "nft"))


def flown(hosts: BridgedHosts, folder: Path, *options: str, first: Mapping[int, str] | None = None) -> list[Job]:
    """The jobs of a run with a preflight, by node."""
    folder.mkdir(exist_ok=True)
    target = script(folder, "print('trained')")
    with hosts.running(folder, "--preflight", *options, target, first=first) as jobs:
        return [job.end() for job in jobs]


def preflight_lines(job: Job) -> list[str]:
    return [line for line in job.err.splitlines() if "preflight: " in line]


@pytest.mark.parametrize("name", TROUBLES)
def test_a_fault_is_named_five_of_five(name: str, tmp_path: Path) -> None:
    trouble = TROUBLES[name]
    for index in range(int(os.environ.get("ALLSTEP_TIMES", "5"))):
        with opened(tmp_path / f"hosts{index}") as hosts:
            trouble.make(hosts)
            jobs = flown(hosts, tmp_path / f"hosts{index}", *trouble.options, first=trouble.first)
        ill = [line for line in preflight_lines(jobs[0]) if "ill: " in line]
        assert len(ill) == 1, jobs[0].text
        assert re.search(trouble.words, ill[0]), jobs[0].text
        assert jobs[0].code == 2
        assert all("trained" not in job.out for job in jobs)


def test_nobody_is_named_among_healthy_hosts(tmp_path: Path) -> None:
    with opened(tmp_path) as hosts:
        on_all(hosts, "1gbit")
        for index in range(int(os.environ.get("ALLSTEP_TIMES", "50"))):
            jobs = flown(hosts, tmp_path / f"run{index}")
            assert [job.code for job in jobs] == [0] * COUNT, jobs[0].text
            (line,) = preflight_lines(jobs[0])
            assert f"preflight: {COUNT} nodes, 28 pairs, {COUNT} devices, all fit" in line
            print(line)


def test_a_run_goes_on_without_an_ill_host(tmp_path: Path) -> None:
    fault = ("--fault", "rank=2,when=preflight,wrong_sums", "--exclude-ill", "1")
    with opened(tmp_path) as hosts:
        jobs = flown(hosts, tmp_path, *fault)
    assert [job.code for job in jobs] == [0] * COUNT, jobs[0].text
    assert "preflight: going on without node 2" in jobs[0].err
    assert "trained" not in jobs[2].out
    assert sorted(line for job in jobs for line in job.out.splitlines()) == [f"[{rank}] trained" for rank in range(7)]
