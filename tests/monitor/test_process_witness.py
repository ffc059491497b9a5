"""What the kernel says of other processes: real ones, which end, burn, sleep and stop."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from allstep.diagnosis.record import ProcessActivity
from allstep.monitor.process_witness import LEAST_S, ProcessWitness
from tests.jobs.processes import freeze
from tests.monitor.driving import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="takes Linux")]

ENDS = {
    "kill": ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    "segfault": ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV),
    "abort": ("import os; os.abort()", -signal.SIGABRT),
    "exit": ("import sys; sys.exit(3)", 3),
    "success": ("pass", 0),
}


@contextlib.contextmanager
def witnessed(code: str) -> Iterator[tuple[ProcessWitness, subprocess.Popen[bytes]]]:
    """A process that waits for a line and then does `code`, and its witness."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.stdin.readline(); {code}"], stdin=subprocess.PIPE
    )
    witness = ProcessWitness(process.pid)
    try:
        yield witness, process
    finally:
        witness.close()
        process.kill()
        process.communicate()


def go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_process_is_known_before_its_parent_asks(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise OSError("an older kernel")

    monkeypatch.setattr(fcntl, "ioctl", denied)
    code, expected = ENDS[end]
    with witnessed(code) as (witness, process):
        assert witness.returncode() is None
        assert not witness.has_ended
        go_on(process)
        wait_for(lambda: witness.has_ended)
        assert witness.returncode() == expected


def test_a_kernel_that_keeps_the_end_tells_it_after_the_parent_has_asked() -> None:
    code, expected = ENDS["kill"]
    with witnessed(code) as (witness, process):
        go_on(process)
        process.wait()
        release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
        assert witness.returncode() == (expected if release >= (6, 15) else None)


def test_a_process_that_is_stopped_has_not_ended() -> None:
    with witnessed("pass") as (witness, process):
        freeze(process.pid)
        assert witness.returncode() is None
        assert witness.activity(0.0) is ProcessActivity.STOPPED
        process.send_signal(signal.SIGCONT)


def activity(witness: ProcessWitness) -> ProcessActivity | None:
    """What it does from now on."""
    witness.activity(time.monotonic())
    time.sleep(LEAST_S)  # the time that is looked at
    return witness.activity(time.monotonic())


def test_one_that_computes_is_told_from_one_that_sleeps() -> None:
    # One call, in which no other thread of it runs.
    with witnessed("sum(range(10**11))") as (witness, process):
        wait_for(lambda: activity(witness) is ProcessActivity.ASLEEP)
        go_on(process)
        wait_for(lambda: activity(witness) is ProcessActivity.BUSY)
        assert witness.activity(time.monotonic()) is ProcessActivity.BUSY  # too soon to tell anew


def test_one_that_a_debugger_holds_is_traced() -> None:
    trace = (
        "import ctypes, os, sys; libc = ctypes.CDLL(None, use_errno=True); pid = int(sys.argv[1]); "
        "ok = libc.ptrace(0x4206, pid, None, None) == 0; print(ok, flush=True); sys.stdin.readline()"
    )
    with witnessed("pass") as (witness, process):
        command = [sys.executable, "-c", trace, str(process.pid)]
        tracer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert tracer.stdout is not None
        allowed = tracer.stdout.readline() == b"True\n"
        found = witness.activity(0.0)
        tracer.communicate(b"\n")
        if not allowed:
            pytest.skip("no process may trace another here")
        assert found is ProcessActivity.TRACED
        assert witness.activity(1.0) is not ProcessActivity.TRACED


def test_only_the_process_at_the_other_end_of_a_connection_has_a_witness() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
        witnessed("pass") as (_, other),
    ):
        witness = ProcessWitness.of_peer(os.getpid(), accepted)
        assert witness is not None
        witness.close()
        assert ProcessWitness.of_peer(other.pid, accepted) is None
        assert ProcessWitness.of_peer(2**22 + 1, accepted) is None
