"""The socket on which rank 0 serves the store in which the ranks meet, where a supervisor reserved it.

A supervisor binds the port and gives rank 0 the bound socket, so that no other process can listen there first. Its
number is in ALLSTEP_STORE_FD as `PID:FD`, and means something in the process of that pid only. `on_given_socket` makes
a function that opens torch's TCPStore use it. Standard library only, and nothing of allstep: a worker loads this file
by its path before the script runs, and `allstep.world` imports it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from types import ModuleType
from typing import Any

VARIABLE = "ALLSTEP_STORE_FD"
_BACKLOG = 1024  # all ranks of a machine come at once


def use_for_rendezvous(module: ModuleType) -> None:
    """Have torch's own rendezvous, this module, serve its store on the given socket too."""
    made = getattr(module, "TCPStore", None)
    if made is not None:  # else it binds the port itself, which is refused, and says so
        vars(module)["TCPStore"] = on_given_socket(made)


def on_given_socket(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but that a store that serves at the port of the given socket serves on that.

    Args:
        make: torch's TCPStore; called with `port` and `is_master` by name.
    """

    def make_store(*args: Any, **options: Any) -> Any:
        serves = options.get("is_master") and "master_listen_fd" not in options
        descriptor = _listening(options.get("port")) if serves else None
        if descriptor is None:
            return make(*args, **options)
        try:
            return make(*args, **options, master_listen_fd=descriptor)  # the store closes it
        except TypeError:  # a torch whose store takes no socket: it binds the port itself
            _share(descriptor)
            return make(*args, **options)

    return make_store


def is_given() -> bool:
    """Whether this very process was given a socket, and not the one that started it."""
    pid, _, number = os.environ.get(VARIABLE, "").partition(":")
    return pid == str(os.getpid()) and number.isdecimal()


def _listening(port: object) -> int | None:
    """A copy of the socket that this process was given for the port, which listens; None where there is none."""
    if not is_given():
        return None
    number = os.environ[VARIABLE].partition(":")[2]
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as copy:
        if copy.getsockname()[1] == port:  # else the script has closed it, and another has its number
            copy.listen(_BACKLOG)
            return copy.detach()
    return None


def _share(descriptor: int) -> None:
    """Let the port be bound a second time, by which it is this process's no more securely than any."""
    with socket.socket(fileno=descriptor) as sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # listens no longer, and stays bound
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
