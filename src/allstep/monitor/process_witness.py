"""What the Linux kernel says of a process of this machine that is nobody's child here: how it ended, and what it does.

A service holds a `ProcessWitness` of a rank's process. It answers three questions, none of which needs that process's
help, so that it also answers for one that is stopped, stuck or gone:
- `has_ended`, also as a descriptor to wait for (`fileno`), and `kill`: about that process and no other, whoever has its
  number by now.
- `returncode`: how it ended. Only its parent may wait for it, and its parent is a launcher that forgets it at once. The
  kernel tells others too: in /proc/PID/stat from when the end begins until the parent has asked, and since Linux 6.15
  by the process's descriptor for as long as that is open. On an older kernel the parent may have been faster. So the
  service asks when the rank's connection closes, which comes before the parent is told.
- `activity`: what it has done since it was last asked.

Where a system has no such descriptors, or the process is another user's, there is no witness, and nothing is said.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import time
from pathlib import Path
from typing import NamedTuple

from allstep.diagnosis.record import ProcessActivity
from allstep.monitor.peer_process import holds_other_end
from allstep.protocol.connection import is_ready

BUSY = 0.05
"""The part of one processor that a process uses at least while it is busy.

A thread that waits for the interpreter lock uses about a tenth of that, and so do libraries' watching threads.
"""

LEAST_S = 0.5
"""Seconds over which a process is looked at, at least: the kernel counts in hundredths of a second."""

_STOPPED, _ENDING, _DISK = "T", "ZXx", "D"
_EXITING = 0x4  # PF_EXITING of linux/sched.h
_SURE_S = 0.0005  # from when the main thread began to end, in which the kernel has noted with which status
_STOP_SIGNALS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)  # none of them ends a process
_TICKS = os.sysconf("SC_CLK_TCK")

# PIDFD_GET_INFO of linux/pidfd.h with the first published size of its structure, whose last field is the exit status.
_INFO = struct.Struct("=QQ11Ii")
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_INFO_EXIT = 1 << 3


class _Stat(NamedTuple):
    """A line of /proc/PID/stat: the main thread's state and whether it ends, all threads' time, and the wait status."""

    state: str
    exiting: bool
    cpu: float
    status: int


class ProcessWitness:
    """Holds on to one process.

    Args:
        pid: its number.

    Raises:
        OSError: there is no such process, or the system has no descriptors of processes.
    """

    def __init__(self, pid: int) -> None:
        if not hasattr(os, "pidfd_open"):
            raise OSError("descriptors of processes take Linux")
        self.pid = pid
        self._process = os.pidfd_open(pid)
        self._stat = -1
        with contextlib.suppress(OSError):
            # Opened once: what is read from it is never about another process that got the number.
            self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        self._exiting: float | None = None  # when its main thread was first seen to end
        self._before: tuple[float, float] | None = None  # the time of the last look, and the processor seconds then
        self._last: ProcessActivity | None = None

    @classmethod
    def of_peer(cls, pid: int, sock: socket.socket) -> ProcessWitness | None:
        """A witness of the process that says it is at the other end of a connection; None where the kernel denies it.

        Else whoever speaks for a rank could have any process of this user watched, or killed.
        """
        try:
            witness = cls(pid)
        except OSError:
            return None
        # Asked when the process is held: its number cannot become another's in between.
        if holds_other_end(pid, sock):
            return witness
        witness.close()
        return None

    def fileno(self) -> int:
        """A descriptor that can be read once the process has ended."""
        return self._process

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return is_ready(self._process)

    def kill(self) -> None:
        """Send it SIGKILL."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def returncode(self) -> int | None:
        """How it ended, or is about to end, as subprocess has it (-N: signal N); None while that is not known."""
        stat = self._read_stat()
        if stat is not None and (stat.state in _ENDING or _is_end(stat) or self._ends_in_order(stat)):
            return os.waitstatus_to_exitcode(stat.status)
        return self._kept_returncode() if self.has_ended else None

    def activity(self, now: float) -> ProcessActivity | None:
        """What it has done since it was last asked, at least `LEAST_S` ago; None where that is not known yet.

        Args:
            now: seconds on any clock that is never turned back.
        """
        stat = self._read_stat()
        if stat is None or stat.state in _ENDING:
            return None
        if self._is_traced():
            return ProcessActivity.TRACED
        if stat.state == _STOPPED:
            return ProcessActivity.STOPPED
        if stat.state == _DISK:
            return ProcessActivity.BUSY  # it waits for a disk or another device, and no signal would end that
        before = self._before
        if before is not None and now - before[0] < LEAST_S:
            return self._last
        self._before = now, stat.cpu
        if before is not None:
            busy = stat.cpu - before[1] >= BUSY * (now - before[0])
            self._last = ProcessActivity.BUSY if busy else ProcessActivity.ASLEEP
        return self._last

    def close(self) -> None:
        """Let go of it."""
        for descriptor in (self._process, self._stat):
            if descriptor >= 0:
                os.close(descriptor)
        self._process = self._stat = -1

    def _read_stat(self) -> _Stat | None:
        if self._stat < 0:
            return None
        with contextlib.suppress(OSError, ValueError, IndexError):  # nothing is left once its parent has asked
            # The second field is the program's name, in which anything can be. What follows begins with the third.
            fields = os.pread(self._stat, 4096, 0).decode("ascii", "replace").rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) / _TICKS
            return _Stat(fields[0], bool(int(fields[6]) & _EXITING), cpu, int(fields[49]))
        return None

    def _ends_in_order(self, stat: _Stat) -> bool:
        """Whether it is sure that a process that ends without a status has none."""
        if stat.exiting and self._exiting is None:
            self._exiting = time.monotonic()
        return self._exiting is not None and time.monotonic() - self._exiting >= _SURE_S

    def _is_traced(self) -> bool:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text("ascii", "replace")
            return re.search(r"^TracerPid:\s*[1-9]", status, re.MULTILINE) is not None
        return False

    def _kept_returncode(self) -> int | None:
        """The status that the kernel keeps with the descriptor, where it does."""
        given = bytearray(_INFO.pack(_INFO_EXIT, *[0] * 13))
        try:
            fcntl.ioctl(self._process, _GET_INFO, given)
        except OSError:
            return None
        known, *_, status = _INFO.unpack(given)
        return os.waitstatus_to_exitcode(status) if known & _INFO_EXIT else None


def _is_end(stat: _Stat) -> bool:
    """Whether the status is that of an end which has begun; a process that was stopped has one too."""
    return stat.status != 0 and stat.state not in "Tt" and stat.status & 0x7F not in (*_STOP_SIGNALS, 0x7F)
