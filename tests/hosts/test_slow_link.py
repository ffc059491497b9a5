"""Row 23 of the fault matrix: over a slow link that loses packets nobody is ended, and a slow rank is named."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from allstep.testing import FaultPlan
from tests.faults.jobs import SCRIPTS
from tests.hosts.hosts import SYSTEM_PATH, Hosts
from tests.launch.command import LIMIT, environment

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


def test_row_23_over_a_slow_lossy_link_nobody_is_ended_and_the_slow_rank_is_named(hosts: Hosts, tmp_path: Path) -> None:
    for host in range(2):
        make_slow(hosts, host)
    fault = FaultPlan.at(1, 2).slow(0.15)
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        processes = []
        for host in range(2):
            own = tmp_path / hosts.names[host]
            own.mkdir()
            where = ["--nnodes", "2", "--node-rank", str(host), "--rdzv", f"{hosts.names[0]}:29400"]
            options = [*where, "--fault", fault.to_text(), "--limits", "link=10,silence=10"]
            command = [sys.executable, "-m", "allstep", "run", *options, str(SCRIPTS / "few_steps.py"), "40"]
            processes.append(stack.enter_context(hosts.start(host, command, folder=own, env=environment())))

        def lose_packets() -> None:
            while not over.wait(1.0):
                hosts.cut(1)
                time.sleep(DOWN_S)
                hosts.restore(1)

        flapping = threading.Thread(target=lose_packets, daemon=True)
        flapping.start()
        try:
            said = [process.communicate(timeout=LIMIT) for process in processes]
        finally:
            over.set()
            flapping.join()
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err
        assert "trained 40" in out
    assert "rank 1 is slow" in said[0][1]
