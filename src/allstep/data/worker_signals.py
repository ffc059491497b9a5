"""DataLoader workers and the signals that announce a job's end, which are for the ranks alone.

Contract: a scheduler that signals every process of a job signals a rank's workers too, and a rank that loses a worker
cannot finish its batch. So a `WorkerStart`, given to a DataLoader as `worker_init_fn`, has SIGTERM and SIGUSR1 do
nothing in a worker, then calls the user's own function. A worker ends as always when its loader is done with it, or
within seconds of its rank's end. One that is stuck in a read does neither, and the end of the rank's interpreter would
wait for it for ever: `end_with_rank` has the workers that are left killed there. Both hold for forked and spawned
workers alike. Programs that a worker starts get the default actions.
"""

from __future__ import annotations

import atexit
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

IGNORED = (signal.SIGTERM, signal.SIGUSR1)

_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """What a worker does first. `own` is the user's `worker_init_fn`, which may set other handlers."""

    own: Callable[[int], Any] | None = None

    def __call__(self, worker_id: int) -> None:
        """Called by torch in the worker."""
        for number in IGNORED:
            signal.signal(number, _ignore)
        if self.own is not None:
            self.own(worker_id)


def end_with_rank(workers: Sequence[BaseProcess]) -> None:
    """Have a DataLoader iterator's workers killed at this interpreter's end at the latest."""
    if workers and not _workers:
        atexit.unregister(_kill)
        atexit.register(_kill)  # multiprocessing was imported before, so its own, which waits for them, comes after
    _workers.update(workers)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A function and not SIG_IGN, which the programs that a worker starts would inherit."""


def _kill() -> None:
    left = [worker for worker in _workers if worker.is_alive()]
    if left and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a worker's death for an error
    for worker in left:
        worker.kill()
