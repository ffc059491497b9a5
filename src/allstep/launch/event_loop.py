"""The supervisor's one loop: everything that can happen is a descriptor in one selector, or a deadline.

Contract: used from the main thread. A part of the supervisor `watch`es a descriptor with what to call when it is
ready. Whoever has a gate of the control channel registers its sockets itself, and is given those that are ready. A part
that has deadlines whoever turns the loop has itself `tend`ed. `turn` waits once, until something is ready, a deadline
of those or `until` has come, and calls what is due; nothing is polled.

Signals to the supervisor, turned into bytes that its loop can wait for beside everything else.

Contract: used from the main thread, as a context manager around the loop. Inside, the signals of `STOP` and `PASS_ON`
do nothing but make `fd` readable, and `take` says which came, in order. Signals that were ignored when the program
started (nohup, a shell's background job) stay ignored. Afterwards everything is as it was.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from allstep.protocol.server import HubKey


class Tended(Protocol):
    """What the loop calls as time passes."""

    def deadline(self) -> float:
        """When `tick` is due, on the monotonic clock."""

    def tick(self) -> None:
        """Act on the time that has passed."""


class Loop:
    """A selector whose keys say what to call."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._tended: list[Tended] = []

    def tend(self, part: Tended) -> None:
        """Call `part.tick` whenever its deadline has passed."""
        self._tended.append(part)

    def leave(self, part: Tended) -> None:
        """Tend a part no longer; nothing where it is not tended."""
        if part in self._tended:
            self._tended.remove(part)

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

    def turn(self, until: float | None) -> None:
        """Wait for what comes next, at most until the monotonic time `until` (None: for ever), and act on it."""
        times = [part.deadline() for part in self._tended] + ([] if until is None else [until])
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        for key, _ in self.selector.select(timeout):
            now = self.selector.get_map().get(key.fd)
            if now is None or now.data is not key.data:
                continue  # what was called before it has closed this one
            if isinstance(key.data, HubKey):
                key.data.owner.ready(key)
            else:
                key.data()
        for part in self._tended.copy():
            if time.monotonic() >= part.deadline():
                part.tick()

    def close(self) -> None:
        """Close the selector; the descriptors are their owners'."""
        self.selector.close()


STOP = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
PASS_ON = frozenset({signal.SIGUSR1, signal.SIGUSR2})


class Signals:
    """Signals as something to wait for."""

    def __init__(self) -> None:
        self.fd = -1
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Signals:
        self.fd, write_end = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write_end, False)
        self._restore.callback(os.close, self.fd)
        self._restore.callback(os.close, write_end)
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_end, warn_on_full_buffer=False))
        for number in STOP | PASS_ON:
            if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                self._handle(number, _nothing, before)
        if (before := signal.getsignal(signal.SIGCHLD)) is signal.SIG_IGN:  # the kernel would reap our workers
            self._handle(signal.SIGCHLD, signal.SIG_DFL, before)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore.close()

    def take(self) -> list[signal.Signals]:
        """Return the signals that came since the last call."""
        try:
            numbers = os.read(self.fd, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in numbers if number in STOP | PASS_ON]

    def _handle(self, number: signal.Signals, handler: Any, before: Any) -> None:
        signal.signal(number, handler)
        self._restore.callback(signal.signal, number, signal.SIG_DFL if before is None else before)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor has told."""
