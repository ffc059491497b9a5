"""Listening on this machine alone, or on every interface and for addresses of both families."""

from __future__ import annotations

import errno
import socket

BACKLOG = 1024
"""Connections that may wait to be accepted: all ranks of a machine, or all machines of a run, come at once."""

HERE = "127.0.0.1"
"""The host to listen on for processes of this machine."""

EVERYWHERE = ""
"""The host to listen on for other machines: IPv6 and IPv4 alike, where the machine has both."""


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening socket.

    Args:
        host: `HERE`, `EVERYWHERE`, or an address of this machine.
        port: 0 for any that is free.

    Raises:
        OSError: the port is in use, or the address is not this machine's.
    """
    if host == EVERYWHERE and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        except OSError as error:  # IPv6 may be compiled in and switched off
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
