"""One worker's process as the supervisor holds it: started, watched, signalled, and let go.

Contract: `start_worker` is called from the main thread (the kernel ties a child to the thread that made it). The
process leads a session and process group of its own. `exit_fd` becomes readable when it has ended, `returncode` then
says how, and until `release` it stays unreaped, so its pid, which is its group's too, can belong to nobody else when
the group is killed. `release` kills what is left of the group and reaps.
What can go wrong: the process cannot be started, which is an OSError; or it does not end after SIGKILL, because the
kernel waits in it for a device or a file system, and `release` leaves it behind.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
from dataclasses import dataclass

from allstep.launch.plan import WorkerPlan


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A started worker, with the descriptors that belong to it."""

    rank: int
    process: subprocess.Popen[bytes]
    stdout: int
    stderr: int
    exit_fd: int
    lifeline: int

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the worker itself; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.process.pid, number)

    def kill_group(self) -> None:
        """Kill the worker and what it started, but for what left its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where only the dead are left
            os.killpg(self.process.pid, signal.SIGKILL)

    def returncode(self) -> int:
        """Return how it ended, as subprocess says it (-N: signal N), once `exit_fd` is readable."""
        if not hasattr(os, "waitid"):
            return self.process.wait()
        end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def release(self, patience: float) -> None:
        """Kill what is left, reap, and close the descriptors.

        Args:
            patience: seconds that it has to end in, after which it is left unreaped.
        """
        self.kill_group()
        ending = select.poll()
        ending.register(self.exit_fd, select.POLLIN)
        if ending.poll(max(0.0, patience) * 1000):
            self.process.wait()
        for fd in (self.stdout, self.stderr, self.exit_fd, self.lifeline):
            os.close(fd)


def start_worker(plan: WorkerPlan, *, pidfd: bool = True) -> WorkerProcess:
    """Start a worker.

    Args:
        plan: what to start.
        pidfd: watch it with a pidfd where the system has those; otherwise a thread waits for it.

    Raises:
        OSError: the process cannot be started.
    """
    with contextlib.ExitStack() as undo:
        theirs, ours = os.pipe()
        undo.callback(os.close, ours)
        stdout, stdout_theirs = os.pipe()
        undo.callback(os.close, stdout)
        stderr, stderr_theirs = os.pipe()
        undo.callback(os.close, stderr)
        notice = {signal.SIGUSR1}  # would end a worker that has not begun to handle it; its bootstrap lets it through
        before = signal.pthread_sigmask(signal.SIG_BLOCK, notice)
        try:
            process = subprocess.Popen(
                plan.command_line(os.getpid(), theirs),
                stdin=None if plan.world_size == 1 else subprocess.DEVNULL,
                stdout=stdout_theirs,
                stderr=stderr_theirs,
                env=dict(plan.environment),
                pass_fds=(theirs,),
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for fd in (theirs, stdout_theirs, stderr_theirs):
                os.close(fd)
        undo.pop_all()
    return WorkerProcess(plan.rank, process, stdout, stderr, _exit_fd(process, pidfd), ours)


def _exit_fd(process: subprocess.Popen[bytes], pidfd: bool) -> int:
    if pidfd and hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            return os.pidfd_open(process.pid)
    read_end, write_end = os.pipe()

    def wait() -> None:
        with contextlib.suppress(ChildProcessError):  # reaped meanwhile
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            else:
                process.wait()
        os.close(write_end)

    threading.Thread(target=wait, daemon=True, name=f"allstep waits for {process.pid}").start()
    return read_end
