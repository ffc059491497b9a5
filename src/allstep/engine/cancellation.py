"""Ctrl-C while an engine runs: the run ends in good order, and then the process.

Contract: `cancellable` is around the outermost run of the main thread, where SIGINT has Python's own handler; else it
does nothing. The first Ctrl-C says one line, on the main rank, and leaves a notice in the `Run`. The loop takes the
notice after the present iteration and puts an end of outcome "cancelled" to the vote, as `Engine.terminate` does. So
all ranks stop at the same iteration, whichever of them the signal reached, and a `Checkpoint` that is attached saves
there. `Engine.run` then raises `Cancelled` on every rank: uncaught, the process ends with exit code 130 and without a
traceback. In an interactive session it is a KeyboardInterrupt, which leaves the session alive.

A Ctrl-C that comes too late for the run's last vote finds the run ended, and saved as ever. It is raised in the same
way, by each rank that it reached: a terminal and `allstep run` reach all of them. The process of a single rank ends by
it, and the others are told of that as of any rank that leaves.

A second Ctrl-C is Python's own: KeyboardInterrupt at once. What can go wrong: while Python waits in native code, in a
step that hangs or a collective, no signal is noticed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from allstep.engine.monitoring import is_nested
from allstep.engine.run import LOOK_NOW, Run
from allstep.errors import Cancelled
from allstep.exit_codes import CANCELLED
from allstep.world.current import is_interactive

REASON = "Ctrl-C"

TOGETHER_S = 0.25
"""Seconds in which two signals are one press of the keys, which a terminal and a launcher both pass on."""

_SAID = (
    "allstep: Ctrl-C: the run ends after the present iteration, and a Checkpoint that is attached saves it. Press "
    "Ctrl-C again to end at once.\n"
)


@contextmanager
def cancellable(run: Run) -> Iterator[None]:
    """The outermost run: let the first Ctrl-C end it in good order. Raises what `cancelled` gives where it is late."""
    if is_nested() or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # the script's own, or it is ignored
        yield
        return
    came_at: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        # Runs between any two instructions of the main thread: no more than two assignments and one write.
        now = time.monotonic()
        if not came_at:
            came_at.append(now)
            run.notice = REASON
            run.until = LOOK_NOW
            if run.coordinator.rank == 0:
                os.write(2, _SAID.encode())
        elif now - came_at[0] >= TOGETHER_S:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is note:  # unless a handler of the script has set another one since
            signal.signal(signal.SIGINT, signal.default_int_handler)
        is_late, run.notice = run.notice is not None, None
    if is_late:
        leaving, run.leaving = run.leaving, None  # the run may have ended so by the same Ctrl-C on another rank
        raise cancelled(REASON) if leaving is None else leaving


def cancelled(reason: str | None) -> BaseException:
    """What `Engine.run` raises when the run has ended as cancelled."""
    return KeyboardInterrupt(reason) if is_interactive() else Cancelled(CANCELLED)
