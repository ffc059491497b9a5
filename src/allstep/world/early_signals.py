"""SIGUSR1 that comes before the script can act on it: it is noted, so that it ends nothing.

Contract: schedulers announce a job's end with SIGUSR1, and its default action ends the process. `init` calls
`note_early_signals` before all else, and closing the World calls `restore_default_action`; both do nothing outside the
main thread, where Python allows no handlers. In between the signal is noted, and `StopOnSignal` finds it when the
script attaches that. Where SIGUSR1 has a handler already nothing changes: a worker of `allstep run` starts with such
a handler. A signal that comes before `init`, while the script is still importing, has its default action.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class EarlySignals:
    """A signal handler that notes the signals' numbers in `received`, where `StopOnSignal` looks for them."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        self.received.append(number)


def note_early_signals() -> None:
    """Note SIGUSR1 from now on, if it has no handler yet."""
    if _in_main_thread() and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, EarlySignals())


def restore_default_action() -> None:
    """Give SIGUSR1 its default action again, unless the script has set a handler of its own since."""
    if _in_main_thread() and isinstance(signal.getsignal(signal.SIGUSR1), EarlySignals):
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
