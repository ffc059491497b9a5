"""How many descriptors this process may have open, and letting it have as many as the system allows.

A service raises its own limit when it starts, so that a few hundred connections of strangers do not keep the run's own
processes out. What it starts gets the limit that was there before: a program may use `select`, which takes no
descriptor above 1023.
"""

from __future__ import annotations

import contextlib
import resource

ENOUGH = 1 << 16
"""Descriptors that a service does with, however many more the system would allow."""


def descriptor_limit() -> int:
    """How many descriptors this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ENOUGH if limit == resource.RLIM_INFINITY else min(limit, ENOUGH)


def raise_descriptor_limit() -> int:
    """Let this process have as many as the system allows; return how many it could have before."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before == resource.RLIM_INFINITY:
        return before
    wanted = ENOUGH if most == resource.RLIM_INFINITY else min(most, ENOUGH)
    if wanted > before:
        with contextlib.suppress(ValueError, OSError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return before


def set_descriptor_limit(limit: int, pid: int) -> None:
    """Give a process the limit that `raise_descriptor_limit` returned; nothing where the system cannot.

    Args:
        limit: what it may have.
        pid: this process, or a child of it that was just started.
    """
    if not hasattr(resource, "prlimit"):
        return
    with contextlib.suppress(OSError, ValueError):  # it may have ended already
        most = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, most))
