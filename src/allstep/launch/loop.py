"""The supervisor's one loop: everything that can happen is a descriptor in one selector, or a deadline.

Contract: used from the main thread. A part of the supervisor `watch`es a descriptor with what to call when it is
ready. Parts that register with the selector themselves (the control channel's service) keep their own `key.data`; such
keys are given to the function set by `delegate`. `turn` waits once, until something is ready or `until` has come, and
calls what is due; nothing is polled.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable


class Loop:
    """A selector whose keys say what to call."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._other: Callable[[selectors.SelectorKey], object] | None = None

    def watch(self, fd: int, call: Callable[[], object], events: int = selectors.EVENT_READ) -> None:
        """Call `call` whenever `fd` is ready."""
        self.selector.register(fd, events, call)

    def forget(self, fd: int) -> None:
        """Watch `fd` no longer; nothing where it is not watched."""
        if fd in self.selector.get_map():
            self.selector.unregister(fd)

    def watches(self, fd: int) -> bool:
        """Whether `fd` is watched."""
        return fd in self.selector.get_map()

    def delegate(self, call: Callable[[selectors.SelectorKey], object] | None) -> None:
        """Give keys that others registered to `call`, or, with None, to nobody."""
        self._other = call

    def turn(self, until: float | None) -> None:
        """Wait for what comes next, at most until the monotonic time `until` (None: for ever), and act on it."""
        timeout = None if until is None else max(0.0, until - time.monotonic())
        for key, _ in self.selector.select(timeout):
            now = self.selector.get_map().get(key.fd)
            if now is None or now.data is not key.data:
                continue  # what was called before it has closed this one
            if callable(key.data):
                key.data()
            elif self._other is not None:
                self._other(key)

    def close(self) -> None:
        """Close the selector; the descriptors are their owners'."""
        self.selector.close()
