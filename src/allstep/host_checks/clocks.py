"""Whether this machine's clock is kept, as the kernel says. `run_folder` compares it with the file server's."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator

from allstep.host_checks.finding import Host, HostFinding

_TIMEX = 256  # bytes; the kernel's record has 208
_MAXERROR_AT, _STATUS_AT = 24, 40  # of struct timex where a long has 8 bytes; see adjtimex(2)
_UNSYNCHRONISED = 0x40  # STA_UNSYNC


def check_clock(host: Host) -> Iterator[HostFinding]:
    """Whether something keeps the clock: logs and files of several machines are compared by it."""
    state = kernel_clock()
    if state is None:
        yield HostFinding("clock", "good", "this kernel does not say whether its clock is kept")
        return
    yield judge_clock(*state, nodes=host.nodes)


def kernel_clock() -> tuple[bool, float] | None:
    """Whether the clock is synchronised, and by how many seconds at most it may be wrong; None where unknown."""
    if not sys.platform.startswith("linux") or struct.calcsize("l") != 8:
        return None
    record = ctypes.create_string_buffer(_TIMEX)  # with no mode set, so that nothing is changed
    if ctypes.CDLL(None).adjtimex(record) < 0:
        return None
    (error,) = struct.unpack_from("q", record.raw, _MAXERROR_AT)
    (status,) = struct.unpack_from("i", record.raw, _STATUS_AT)
    return not status & _UNSYNCHRONISED, error / 1e6


def judge_clock(synchronised: bool, error: float, *, nodes: int) -> HostFinding:
    """A clock that nobody keeps matters where several machines are meant."""
    if synchronised:
        return HostFinding("clock", "good", f"synchronised, to {error:.2g} s at worst")
    text = "the kernel says that nothing synchronises this machine's clock"
    if nodes == 1:
        return HostFinding("clock", "good", f"{text}; that matters with several machines")
    return HostFinding("clock", "warning", text, "Start chrony or systemd-timesyncd on every machine")
