"""Where a service is, as text and as a pair, and the secret that it asks for."""

from __future__ import annotations

import secrets

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


def new_nonce() -> str:
    """A secret for one start of one run."""
    return secrets.token_hex(16)
