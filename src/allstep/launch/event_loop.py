"""The supervisor's event loop: everything that can happen is a descriptor in one selector, or a deadline.

Contract: used from the main thread.
- `watch` names a descriptor and what to call when it is ready. Servers of the control protocol register their sockets
  in `selector` themselves, and are given those that are ready.
- A part with deadlines that no other part asks for is given to `add_timer`; its `tick` is called when one has passed.
- `turn` waits once, until something is ready, such a deadline or `until` has come, and calls what is due.
Nothing is polled.

Signals to the supervisor are bytes in a pipe (`SignalPipe`), so that the loop waits for them beside everything else and
they are acted on between two events, never in the middle of one.
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

from allstep.protocol.server import SocketKey

STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
"""Signals that end a run."""

FORWARDED_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGUSR2})
"""Signals that mean something to the workers only, such as a scheduler's notice before a job's end."""


class Timed(Protocol):
    """What the loop calls as time passes."""

    def deadline(self) -> float:
        """When `tick` is due, on the monotonic clock."""

    def tick(self) -> None:
        """Act on the time that has passed."""


class EventLoop:
    """A selector whose keys say what to call."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._timers: list[Timed] = []

    def add_timer(self, part: Timed) -> None:
        """Call `part.tick` whenever its deadline has passed."""
        self._timers.append(part)

    def remove_timer(self, part: Timed) -> None:
        """Call `part.tick` no longer; nothing where it was not added."""
        if part in self._timers:
            self._timers.remove(part)

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
        times = [part.deadline() for part in self._timers] + ([] if until is None else [until])
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        for key, _ in self.selector.select(timeout):
            now = self.selector.get_map().get(key.fd)
            if now is None or now.data is not key.data:
                continue  # what was called before it has closed this one
            if isinstance(key.data, SocketKey):
                key.data.owner.ready(key)
            else:
                key.data()
        for part in self._timers.copy():  # a tick may remove its own part
            if time.monotonic() >= part.deadline():
                part.tick()

    def close(self) -> None:
        """Close the selector; the descriptors are their owners'."""
        self.selector.close()


class SignalPipe:
    """The signals of `STOP_SIGNALS` and `FORWARDED_SIGNALS`, as something to wait for: a context manager.

    Inside it they do nothing but make `fd` readable, and `take` says which came, in order. Signals that were ignored
    when the program started (nohup, a shell's background job) stay ignored. Afterwards everything is as it was.
    """

    def __init__(self) -> None:
        self.fd = -1
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> SignalPipe:
        self.fd, write_end = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write_end, False)
        self._restore.callback(os.close, self.fd)
        self._restore.callback(os.close, write_end)
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_end, warn_on_full_buffer=False))
        for number in STOP_SIGNALS | FORWARDED_SIGNALS:
            if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                self._handle(number, _do_nothing, before)
        # Where SIGCHLD is ignored the kernel reaps children, and nobody could say how a worker ended.
        if (before := signal.getsignal(signal.SIGCHLD)) is signal.SIG_IGN:
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
        return [signal.Signals(number) for number in numbers if number in STOP_SIGNALS | FORWARDED_SIGNALS]

    def _handle(self, number: signal.Signals, handler: Any, before: Any) -> None:
        signal.signal(number, handler)
        # None stands for a handler that was not set from Python, which cannot be set again from here.
        self._restore.callback(signal.signal, number, signal.SIG_DFL if before is None else before)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal so that it has no effect of its own: the interpreter has written it to the pipe."""
