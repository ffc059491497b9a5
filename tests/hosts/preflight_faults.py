"""Faults to put into eight hosts before a preflight, the line in which each is to be named, and how such a run is made.

Contract: `opened_hosts_of_a_preflight` gives hosts, as far as they can be made; `FAULTS` has each fault by name,
`rehearse` puts one in and returns what came of it, and `run_preflight` looks at hosts as they are. The nightly tests
and `benchmarks/named_faults.py` share them. Rates are kept far below what one machine can do for eight hosts at once,
so that the network is what is measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts.bridged import BridgedHosts
from tests.hosts.conftest import opened_bridge
from tests.jobs.job import Job
from tests.jobs.launchers import script

COUNT = 8


@dataclass(frozen=True)
class HostFault:
    """A fault: what is done to hosts, and the line in which it is named."""

    words: str
    make: Callable[[BridgedHosts], object] = lambda hosts: None
    options: tuple[str, ...] = ()
    first: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Preflight:
    """What came of a run with a preflight: the jobs, by node, and what node 0 said of it."""

    jobs: list[Job]

    @property
    def lines(self) -> list[str]:
        """What the preflight said."""
        return [line for line in self.jobs[0].err.splitlines() if "preflight: " in line]

    @property
    def ill(self) -> list[str]:
        """The lines in which something is named as ill."""
        return [line for line in self.lines if "preflight: ill: " in line]

    @property
    def seconds(self) -> float:
        """From the start of node 0's command to its end."""
        return self.jobs[0].ended - self.jobs[0].began


def limit_all(hosts: BridgedHosts, rate: str) -> None:
    """Give all hosts links of one rate."""
    for host in range(COUNT):
        hosts.limit_rate(host, rate)


def _tenth_of_the_rate(hosts: BridgedHosts) -> None:
    limit_all(hosts, "200mbit")
    hosts.limit_rate(5, "20mbit")


def _only_from(host: int, other: int, what: str) -> Callable[[BridgedHosts], None]:
    return lambda hosts: hosts.filter(host, f"ip saddr {hosts.addresses[other]} {what}")


def _lossy(hosts: BridgedHosts) -> None:
    hosts.send_single_packets(2)
    _only_from(6, 2, "numgen random mod 100 < 10 drop")(hosts)


FAULTS = {
    "a link at a tenth of the rate": HostFault(
        r"ill: node 5 \(host5\): its links to nodes .* are ill: .*/s, where the others have", _tenth_of_the_rate
    ),
    "a lossy link between two": HostFault(
        r"ill: between node 2 \(host2\) and node 6 \(host6\): \d+% of the packets are lost",
        _lossy,
    ),
    "a blocked port": HostFault(
        r"ill: node 3 \(host3\): its links to nodes .* are ill: .*does not answer",
        lambda hosts: hosts.filter(3, "tcp flags & (syn|ack) == syn drop"),
    ),
    "a pair that cannot talk": HostFault(
        r"ill: between node 1 \(host1\) and node 4 \(host4\): .*does not answer", _only_from(4, 1, "drop")
    ),
    "a wrong host name": HostFault(
        r"ill: node 2 \(host2\): host name: host2 resolves to 10.99.0.1, which is no address of this machine",
        lambda hosts: hosts.rename(2, "10.99.0.1"),
    ),
    "a clock a minute off": HostFault(
        r"ill: node 7 \(host7\): its clock is \d\d s ahead of the others'",
        options=("--fault", "rank=7,clock=60"),
    ),
    "a full disk": HostFault(
        r"ill: node 4 \(host4\): folder: .*has 1 MiB free",
        first={4: "mkdir runs; mount -t tmpfs -o size=1m tmpfs runs"},
    ),
    "a device whose sums are wrong": HostFault(
        r"ill: node 6 \(host6\): device 0 \(cpu\): it computes wrong sums",
        options=("--fault", "rank=6,when=preflight,wrong_sums"),
    ),
}
"""What the nightly tests and the table on the doctor's page are made of."""


def opened_hosts_of_a_preflight(folder: Path) -> AbstractContextManager[BridgedHosts]:
    """Eight hosts, connected; the test is skipped where they cannot be made."""
    return opened_bridge(folder, COUNT, programs=("tc", "nft"))


def run_preflight(
    hosts: BridgedHosts, folder: Path, *options: str, first: Mapping[int, str] | None = None
) -> Preflight:
    """Run a script that prints `trained` on all hosts, after a preflight."""
    folder.mkdir(exist_ok=True)
    target = script(folder, "print('trained')")
    with hosts.running(folder, "--preflight", *options, target, first=first) as jobs:
        return Preflight([job.end() for job in jobs])


def rehearse(fault: HostFault, folder: Path) -> Preflight:
    """Put a fault into new hosts and look at them."""
    with opened_hosts_of_a_preflight(folder) as hosts:
        fault.make(hosts)
        return run_preflight(hosts, folder, *fault.options, first=fault.first)


def is_named(fault: HostFault, seen: Preflight) -> bool:
    """Whether the fault, and nothing else, was named as ill, and nothing was started."""
    right = len(seen.ill) == 1 and re.search(fault.words, seen.ill[0]) is not None
    return right and seen.jobs[0].code == 2 and all("trained" not in job.out for job in seen.jobs)


def is_well(seen: Preflight) -> bool:
    """Whether nothing was named, no warning either, and all trained."""
    return len(seen.lines) == 1 and all(job.code == 0 and "trained" in job.out for job in seen.jobs)
