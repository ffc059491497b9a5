"""Ports for what a test starts: free, and nobody else's until that listens.

A port that the system chose would do for no longer than until a connection of another test is given the same one.
These are below those that it chooses from, and each process of a test run has a range of its own.
"""

from __future__ import annotations

import itertools
import os
import socket

_RANGE = 1000
_OWN = 12000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 18 * _RANGE
_following = itertools.count(os.getpid())


def free_port() -> int:
    """A port of this machine that nobody listens on, another one in each call."""
    while True:
        port = _OWN + next(_following) % _RANGE
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
