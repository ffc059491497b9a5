"""`allstep run` as the first process of a container, which a new PID namespace is."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.jobs.launchers import ALLSTEP, script
from tests.jobs.running import run, start

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a PID namespace needs root and util-linux"
)

IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")

LEAVES_ORPHANS = """
import subprocess, time
for _ in range(50):
    subprocess.run(["sh", "-c", "sleep 0.1 & exit"])  # the shell's child outlives it

def zombies():
    states = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            states.append(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0])
        except OSError:
            pass
    return states.count("Z")

def sleeping():
    return "sleep" in subprocess.run(["ps", "-A"], capture_output=True, text=True).stdout

until = time.monotonic() + 20
while time.monotonic() < until and (zombies() or sleeping()):
    time.sleep(0.05)
print("number", os.getppid() != 1, "zombies", zombies(), flush=True)
sys.exit(7)
"""


def test_orphans_are_reaped_and_the_exit_code_is_the_runs(tmp_path: Path) -> None:
    job = run(tmp_path, "--nproc", "1", script(tmp_path, LEAVES_ORPHANS), command=_contained())
    assert job.code == 7, job.text
    assert "zombies 0" in job.text


def test_a_signal_to_the_first_process_stops_the_run(tmp_path: Path) -> None:
    target = script(tmp_path, "import signal\nprint('waits', flush=True)\nsignal.pause()")
    with start(tmp_path, [*_contained(), "--nproc", "1", str(target)]) as running:
        running.await_line("waits")
        (first,) = [pid for pid in running.pids() if _number_inside(pid) == 1]
        os.kill(first, signal.SIGTERM)
        job = running.end()
    assert "stopped by SIGTERM" in job.text
    assert job.text.count("SIGTERM: passed on") <= 1  # once, not as a second one that ends workers at once


def _contained() -> Sequence[str]:
    return (*IN_A_CONTAINER, *ALLSTEP, "run")


def _number_inside(pid: int) -> int:
    """The number that a process has in its innermost namespace."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return 0
