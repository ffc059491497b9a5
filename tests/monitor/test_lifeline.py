"""A pipe's end that closes when a process begins to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from allstep.monitor import lifeline as lifeline_module
from allstep.monitor.lifeline import Lifeline
from allstep.protocol.connection import is_ready
from tests.monitor.driving import BOUND

# It has gigabytes to free, which takes the kernel a while, and tells that it has them.
HOLDER = """
import mmap, sys, time
from allstep.monitor.lifeline import Lifeline
held = Lifeline(int(sys.argv[1]))
memory = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, len(memory), 4096):
    memory[at] = 1
print("ready", flush=True)
time.sleep(600)
"""


def test_it_closes_on_release_and_not_before():
    theirs, ours = os.pipe()
    held = Lifeline(ours)
    assert not is_ready(theirs, 0.1)
    held.release()
    held.release()
    assert is_ready(theirs, BOUND)
    assert os.read(theirs, 1) == b""
    os.close(theirs)


def test_a_forked_child_does_not_hold_it():
    theirs, ours = os.pipe()
    wait, wake = os.pipe()
    held = Lifeline(ours)
    child = os.fork()
    if child == 0:
        os.close(wake)
        os.read(wait, 1)
        os._exit(0)
    held.release()
    assert is_ready(theirs, BOUND)
    os.close(wake)
    os.waitpid(child, 0)
    for fd in (theirs, wait):
        os.close(fd)


def test_without_a_table_of_files_for_a_thread_the_process_holds_it(monkeypatch):
    monkeypatch.setattr(lifeline_module, "_keep_only", lambda *fds: False)
    theirs, ours = os.pipe()
    held = Lifeline(ours)
    assert not is_ready(theirs, 0.1)
    held.release()
    assert is_ready(theirs, BOUND)
    os.close(theirs)


def test_the_process_keeps_all_its_own_files():
    theirs, ours = os.pipe()
    other, end = os.pipe()
    held = Lifeline(ours)
    os.write(end, b"x")
    assert os.read(other, 1) == b"x"
    held.release()
    for fd in (theirs, other, end):
        os.close(fd)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux gives a thread its own files")
def test_it_mostly_closes_before_the_memory_of_a_killed_process_is_freed():
    # Whichever of a process' threads goes last frees the memory; where that is the lifeline's, it closes behind.
    assert any(closed_before_memory_was_freed() for _ in range(8))


def closed_before_memory_was_freed() -> bool:
    """Kill a process that has much memory; whether its pipe's end closed well before its end was told."""
    theirs, ours = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(ours)], pass_fds=[ours], stdout=subprocess.PIPE)
    os.close(ours)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"ready\n"
        pidfd = os.pidfd_open(process.pid)
        process.send_signal(signal.SIGKILL)
        assert is_ready(theirs, BOUND)
        closed = time.monotonic()
        assert is_ready(pidfd, BOUND)
        # Freeing a gigabyte of small pages takes tens of milliseconds; a file that it held itself would close behind.
        took = time.monotonic() - closed
        for fd in (theirs, pidfd):
            os.close(fd)
    return took > 0.002
