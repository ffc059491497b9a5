"""Workers that are forked from one process of this machine, the template, so that they import torch once.

This is the supervisor's side; what the template itself does is in `template.py`.

Contract: `can_fork` says whether this system has what is needed. A `Template` is started from the main thread, with the
plans of this machine's workers and their pipes, which stay open. While it runs, this process is the nearest subreaper
of all that it starts, so that workers whose parent has ended become its children.
- `process.exit_fd` becomes readable when the template has ended. Then `adopt` is called once: it gives the workers,
  which have become children of this process and start running their script, or None where there are none. In that case
  they are to be started one by one, with the same pipes.
- Before, `process.kill_group` ends the template and what it has forked. `abandon` does so instead of `adopt`, and
  reaps.
What can go wrong: the template cannot be started (OSError), ends early, or is killed; then `adopt` gives None.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from allstep.launch.process import Pipes, WorkerProcess, bind, spawn, watched
from allstep.launch.worker_plan import WorkerPlan

_TEMPLATE = str(Path(__file__).with_name("template.py"))
_PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_PR_GET_CHILD_SUBREAPER = 37
_REPORT_SIZE = 1 << 20  # bytes; more than any report has
_REAP_SECONDS = 1.0  # in which killed processes are reaped at the most


@dataclass(slots=True)
class ForkedChild:
    """A child that another process forked for this one."""

    pid: int
    _returncode: int | None = field(default=None, init=False)

    def wait(self) -> int:
        """Wait for its end, reap it, and return how it ended (-N: signal N)."""
        if self._returncode is None:
            self._returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._returncode


def can_fork() -> bool:
    """Whether this process can adopt workers that another has forked."""
    system = sys.platform == "linux" and hasattr(os, "pidfd_open") and os.path.isdir("/proc/self/task")
    return system and _adopts_orphans() is not None


class Template:
    """The process that imports what all workers begin with, and then forks them.

    Args:
        plans: the workers of this machine.
        pipes: those of each.
        modules: what to import first.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, plans: Sequence[WorkerPlan], pipes: Sequence[Pipes], modules: Sequence[str]) -> None:
        first = plans[0]
        self._plans = plans
        # What differs between ranks is set in each fork; the rest, from the start, as a library may read it at import.
        common = dict(set.intersection(*(set(plan.environment.items()) for plan in plans)))
        ranks = [
            {
                "environment": {name: text for name, text in plan.environment.items() if name not in common},
                "stdout": own.stdout[1],
                "stderr": own.stderr[1],
                "lifeline": own.lifeline[1],
                "store": plan.store_fd,
            }
            for plan, own in zip(plans, pipes, strict=True)
        ]
        stores = [plan.store_fd for plan in plans if plan.store_fd is not None]
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as undo:
            # Workers wait at `release` until this process closes its end, which closing `self._undo` does.
            lifeline, release = _pipe(theirs, undo)[0], _pipe(theirs, undo)[0]
            self._report, report = _pipe(undo, theirs)
            plan_file = os.memfd_create("allstep plan")  # a command line or pipe might be too small for it
            theirs.callback(os.close, plan_file)
            plan = {"modules": modules, "ranks": ranks, "release": release, "report": report}
            os.write(plan_file, json.dumps(plan).encode())
            os.lseek(plan_file, 0, os.SEEK_SET)
            numbers = [str(number) for number in (os.getpid(), lifeline, plan_file)]
            # Put back afterwards: a program that supervises may have been a subreaper itself, or none.
            undo.callback(_adopt_orphans, bool(_adopts_orphans()))
            _adopt_orphans(True)
            self.process = watched(
                spawn(
                    [sys.executable, _TEMPLATE, *numbers, *first.command.words()],
                    common,
                    pipes[0],
                    first,
                    [lifeline, release, report, plan_file, *(fd for each in pipes for fd in each.theirs), *stores],
                )
            )
            self._undo = undo.pop_all()

    def adopt(self) -> list[WorkerProcess] | None:
        """Return the workers, in the order of their plans, and let them run; None where there are none."""
        workers = self._forked() if self.process.returncode() == 0 else None
        if workers is None:
            self.abandon(0.0)
            return None
        self.process.child.wait()
        os.close(self.process.exit_fd)
        self._undo.close()  # among others the pipe that the workers wait at
        return workers

    def abandon(self, patience: float) -> None:
        """End the template and what it has forked, for which it has `patience` seconds."""
        self.process.release(patience)
        _reap_group(self.process.child.pid)
        self._undo.close()

    def _forked(self) -> list[WorkerProcess] | None:
        """The workers that the template reported, or None where it reported none that can be watched."""
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as undo:
            workers = []
            for pid, plan in zip(json.loads(os.read(self._report, _REPORT_SIZE)), self._plans, strict=True):
                workers.append(watched(ForkedChild(pid)))
                undo.callback(os.close, workers[-1].exit_fd)
                bind(pid, plan)  # it waits, and has no second thread yet
            undo.pop_all()
            return workers
        return None


def _reap_group(leader: int) -> None:
    """Reap those of a killed process group that have become children of this process."""
    until = time.monotonic() + _REAP_SECONDS
    with contextlib.suppress(ChildProcessError):  # there are no more
        while time.monotonic() < until:
            if os.waitpid(-leader, os.WNOHANG)[0] == 0:
                time.sleep(0.005)  # their pids are not known, so there is nothing to wait for that can be bounded


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose ends are closed with these."""
    ends = os.pipe()
    reader.callback(os.close, ends[0])
    writer.callback(os.close, ends[1])
    return ends


def _adopts_orphans() -> bool | None:
    """Whether this process is the nearest subreaper of what it starts; None where the system knows of no such."""
    try:
        import ctypes

        answer = ctypes.c_int()
        known = ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0) == 0
    except (ImportError, OSError, AttributeError):
        return None
    return bool(answer.value) if known else None


def _adopt_orphans(yes: bool) -> None:
    """Be the nearest subreaper of what this process starts, or not."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)
