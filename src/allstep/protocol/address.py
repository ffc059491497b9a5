"""Where a service is, as text and as a host and port; listening there; and the secret that it asks for.

`listen` takes `HERE` for processes of this machine, or `EVERYWHERE` for other machines, in both families of addresses.
"""

from __future__ import annotations

import errno
import secrets
import socket

from allstep.errors import WorldError


def split_address(address: str) -> tuple[str, int]:
    """A host and a port from `127.0.0.1:29500` or `[::1]:29500`.

    Raises:
        WorldError: it is neither.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise WorldError(f"the control channel's address is {address!r}; it must be HOST:PORT (ALLSTEP_CHANNEL)")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The text of a host and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def new_key() -> str:
    """A secret for one start of one run."""
    return secrets.token_hex(16)


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
    # One socket for both families, so that a port that is free in only one of them counts as taken.
    if host == EVERYWHERE and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        except OSError as error:  # IPv6 may be compiled in and switched off
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
