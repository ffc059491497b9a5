"""A notice of the job's end that comes before the script can act on it: kept, so that it ends nothing.

Contract: `init` calls `keep` before all else, and closing the World calls `give_back`; both do nothing outside the main
thread. In between SIGUSR1, with which schedulers announce a job's end, is noted by the handler that the script then
finds, unless somebody handles it already: a worker of `allstep run` is born with such a handler. What comes before
`init`, while a script is still importing, meets the default action, and that is the end of the process.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Notices:
    """Notes signals in `received`, where `StopOnSignal` looks for them."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        self.received.append(number)


def keep() -> None:
    """Note SIGUSR1 from now on, if nobody handles it."""
    if _in_main_thread() and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, Notices())


def give_back() -> None:
    """Give SIGUSR1 its default action back, if it is still ours."""
    if _in_main_thread() and isinstance(signal.getsignal(signal.SIGUSR1), Notices):
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
