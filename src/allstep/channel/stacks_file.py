"""The file in which a rank's stacks are when the rank itself cannot answer: written by `faulthandler`'s timer.

Contract: a rank makes the file and tells its service the address, with which any process of the same user on the same
machine can read it for as long as the rank lives. It is in memory and in no folder, so nothing is left however the rank
ends. The address has the file's name, which no other file has, so that it is not mistaken on another machine. Where a
system cannot do that, there is no file.
"""

from __future__ import annotations

import os

_LARGEST = 256 << 10


def make_stacks_file() -> tuple[int, str]:
    """Make a file for this process: its descriptor and address.

    Raises:
        OSError: there can be none.
    """
    if not hasattr(os, "memfd_create") or not os.path.exists("/proc/self/fd"):
        raise OSError("a file in memory that others can read takes Linux")
    name = f"allstep-stacks-{os.urandom(8).hex()}"
    descriptor = os.memfd_create(name)
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}/{name}"


def read_stacks(address: str) -> str:
    """The last stacks in a rank's file; empty where there are none, or no such file here."""
    link, _, name = address.rpartition("/")
    try:
        if not name or not os.readlink(link).startswith(f"/memfd:{name}"):
            return ""
        with open(link, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LARGEST))
            return file.read(_LARGEST).decode(errors="replace")
    except OSError:
        return ""
