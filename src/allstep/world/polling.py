"""Waiting for a condition with a deadline.

A store is polled, not waited on: its blocking calls print to stderr when their time is up, keep Ctrl-C from
arriving, and can outlive their limit when the server is frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_PAUSE_S = 0.25


def poll(condition: Callable[[], bool], deadline: float) -> bool:
    """Whether the condition came true before `deadline`, a time of `time.monotonic`; it is asked at least once.

    Pauses grow with the time waited, to a quarter of a second, so that a thousand ranks do not crowd one server.
    """
    start = time.monotonic()
    while not condition():
        now = time.monotonic()
        if now >= deadline:
            return False
        # What is asked cannot be waited for; the longer it has taken, the less often it is asked.
        time.sleep(min(0.001 + (now - start) / 10, _LONGEST_PAUSE_S, deadline - now))
    return True
