"""Being the first process of a container: what ends there without a parent has to be reaped, and nobody else does.

Contract: `launch` calls `leave_init_to_parent` before it does anything. Where this process is number 1, it forks. The
child returns and does all the work. The parent stays: it passes signals on to the child, reaps every process that the
kernel hands to number 1, and ends as the child ends. Anywhere else the call does nothing. The workers of a script that
leaves processes behind, as pools of loaders do, would otherwise fill the container's table of processes with zombies.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import NoReturn


def leave_init_to_parent() -> None:
    """Go on in a child, where this process is the first of a container."""
    if os.getpid() != 1:
        return
    every = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)  # none is lost between the fork and the parent's loop
    child = os.fork()
    if child == 0:
        _lead_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    _serve(child, every)


def _lead_terminal() -> None:
    """Have Ctrl-C come to this process and not to its parent, which would pass it on as a second one."""
    os.setpgid(0, 0)
    with contextlib.suppress(OSError):  # there is no terminal
        if os.isatty(0):
            os.tcsetpgrp(0, os.getpid())  # SIGTTOU is blocked here


def _serve(child: int, every: set[signal.Signals] | set[int]) -> NoReturn:
    while True:
        number = signal.sigwait(every)
        if number == signal.SIGCHLD:
            _reap(child)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


def _reap(child: int) -> None:
    """Reap all that has ended; the end of `child` is this process's own."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
                os._exit(code if code >= 0 else 128 - code)
