"""Which process holds the other end of a TCP connection of this machine, as the Linux kernel tells it.

A process can say any pid of itself. The kernel has the truth: /proc/net/tcp lists all connections of the machine with
the inode of each end, and /proc/PID/fd the inodes that a process has open. Both are read here, and nothing is believed
that they do not show: where a system has no /proc, or the process is another user's, the answer is no.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

_TABLES = {socket.AF_INET: "/proc/self/net/tcp", socket.AF_INET6: "/proc/self/net/tcp6"}


def holds_other_end(pid: int, sock: socket.socket) -> bool:
    """Whether process `pid` has the socket open that the connected socket `sock` is connected to, on this machine."""
    with contextlib.suppress(OSError, ValueError):
        theirs, ours = _address(sock.getpeername()), _address(sock.getsockname())
        inode = _inode(theirs, ours)
        return inode is not None and _has_open(pid, f"socket:[{inode}]")
    return False


def _address(name: tuple[str, int]) -> tuple[int, str]:
    """The family of an address, and how the kernel's table writes it."""
    host, port = name[0].removeprefix("::ffff:").partition("%")[0], name[1]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = socket.inet_pton(family, host)
    words = [packed[at : at + 4] for at in range(0, len(packed), 4)]
    # Each word of four bytes is written as the number that this processor takes it for.
    return family, "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{port:04X}"


def _inode(local: tuple[int, str], remote: tuple[int, str]) -> str | None:
    """The inode of the socket with this local and this remote address."""
    # A socket of IPv6 may carry a connection of IPv4; its addresses are then written with this beginning.
    mapped = f"{0:016X}{int.from_bytes(bytes.fromhex('0000ffff'), sys.byteorder):08X}"
    for family, path in _TABLES.items():
        if family < local[0]:
            continue
        beginning = mapped if family != local[0] else ""
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as table:
            for line in table:
                fields = line.split()
                if fields[1:3] == [beginning + local[1], beginning + remote[1]]:
                    return fields[9]
    return None


def _has_open(pid: int, link: str) -> bool:
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(f"{folder}/{number}") == link:
                return True
    return False
