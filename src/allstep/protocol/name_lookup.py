"""The addresses of a host, found without a wait: a name server that does not answer must not keep an event loop.

Contract: `NameLookup` is called with a host and a port, again and again until it gives their addresses. It gives None
while they are not known. Numbers are known at once. A name is looked up in a thread of its own, because the system's
call cannot be bounded or taken back; it is a daemon thread, so a process does not wait for it at its end. What can go
wrong: the name does not resolve, which is an OSError of the call that learns of it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

SocketAddress = tuple[int, tuple[Any, ...]]
"""One of a target's addresses: its family, and what a socket of that family takes."""

_SOON_S = 0.05  # for which a call waits: most names are known by then


def resolve(host: str, port: int, flags: int = 0) -> list[SocketAddress]:
    """All addresses of a host.

    Raises:
        OSError: the name does not resolve.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(each[0], each[4]) for each in found]


class NameLookup:
    """Looks up names; `lookup` is the system's way to do it."""

    def __init__(self, lookup: Callable[[str, int], Sequence[SocketAddress]] = resolve) -> None:
        self._lookup = lookup
        self._under_way: dict[tuple[str, int], _LookupUnderWay] = {}

    def __call__(self, host: str, port: int) -> Sequence[SocketAddress] | None:
        """The addresses; None while they are not known."""
        try:
            return resolve(host, port, socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            pass  # it is a name
        answer = self._under_way.get((host, port))
        if answer is None:
            answer = self._under_way[host, port] = _LookupUnderWay(self._lookup, host, port)
        answer.thread.join(_SOON_S)
        if answer.thread.is_alive():
            return None
        del self._under_way[host, port]  # asked anew the next time: a name may come to resolve only later
        if answer.error is not None:
            raise answer.error
        return answer.addresses


class _LookupUnderWay:
    def __init__(self, lookup: Callable[[str, int], Sequence[SocketAddress]], host: str, port: int) -> None:
        self.addresses: Sequence[SocketAddress] = ()
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._ask, args=(lookup, host, port), daemon=True, name="allstep lookup")
        self.thread.start()

    def _ask(self, lookup: Callable[[str, int], Sequence[SocketAddress]], host: str, port: int) -> None:
        try:
            self.addresses = lookup(host, port)
        except OSError as error:
            self.error = error
        except UnicodeError as error:  # a name that no name server knows
            self.error = OSError(f"{host!r} is no name of a host: {error}")
