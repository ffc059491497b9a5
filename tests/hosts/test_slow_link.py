"""Row 23 of the fault matrix: over a slow link that loses packets nobody is ended, and a slow rank is named."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.faults.rehearsal import SCRIPTS
from tests.hosts.hosts import SYSTEM_PATH, Hosts

pytestmark = pytest.mark.slow

SLOW = ["tbf", "rate", "2mbit", "burst", "32kbit", "latency", "400ms"]
DOWN_S = 0.3


def make_slow(hosts: Hosts, host: int) -> None:
    tc = shutil.which("tc", path=SYSTEM_PATH)
    if tc is None:
        pytest.skip("tc is not installed")
    namespace = hosts.namespaces[host]
    command = [tc, "-n", namespace, "qdisc", "add", "dev", "eth0", "root", *SLOW]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the kernel cannot slow a link down: {done.stderr.strip()}")


@pytest.mark.nightly
def test_row_23_a_slow_lossy_link_ends_nobody(hosts: Hosts, tmp_path: Path) -> None:
    for host in range(2):
        make_slow(hosts, host)
    fault = FaultPlan.at(1, 2).slow(0.15)
    over = threading.Event()

    def lose_packets() -> None:
        while not over.wait(1.0):
            hosts.cut(1)
            time.sleep(DOWN_S)  # the fault itself
            hosts.restore(1)

    flapping = threading.Thread(target=lose_packets, daemon=True)
    arguments = ["--fault", fault.to_text(), "--limits", "link=10,silence=10", SCRIPTS / "few_steps.py", "40"]
    with hosts.started(0, tmp_path, *arguments) as head, hosts.started(1, tmp_path, *arguments) as other:
        flapping.start()
        try:
            jobs = [head.end(), other.end()]
        finally:
            over.set()
            flapping.join()
    for job in jobs:
        assert job.code == 0, job.text
        assert "trained 40" in job.out
        assert " failed: " not in job.err
        assert "killed" not in job.err
    assert "rank 1 is slow" in jobs[0].err
    assert "rank 0 is slow" not in jobs[0].err
