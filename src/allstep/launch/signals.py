"""Signals to the supervisor, turned into bytes that its loop can wait for beside everything else.

Contract: used from the main thread, as a context manager around the loop. Inside, the signals of `STOP` and `PASS_ON`
do nothing but make `fd` readable, and `take` says which came, in order. Signals that were ignored when the program
started (nohup, a shell's background job) stay ignored. Afterwards everything is as it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

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
