"""A process that the supervisor starts, a worker or what workers are forked from: watched, signalled, and let go.

Contract: `start_worker` and `watched` are called from the main thread (the kernel ties a child to the thread that made
it), with pipes that the caller opened and, once the process has its ends, hands over. The process leads a session and
process group of its own. `exit_fd` becomes readable when it has ended, and `returncode` then gives how. Until `release`
it stays unreaped, so that no other process can have its pid, which is its group's too, when the group is killed.
`release` kills what is left of the group and reaps.
Each worker has three pipes (`Pipes`): standard output, standard error, and the lifeline, whose end tells it that this
process is gone.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from allstep.launch.worker_plan import WorkerPlan
from allstep.protocol.descriptors import set_descriptor_limit


class Child(Protocol):
    """A child of this process, such as `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def wait(self) -> int:
        """Wait for its end, reap it, and return how it ended (-N: signal N); the same again when called again."""


@dataclass(frozen=True, slots=True)
class Pipes:
    """A worker's output and its lifeline: our end and its own of each."""

    stdout: tuple[int, int]
    stderr: tuple[int, int]
    lifeline: tuple[int, int]

    @classmethod
    def open(cls) -> Pipes:
        """Open three pipes, or raise OSError and leave none open."""
        with contextlib.ExitStack() as undo:
            pipes = []
            for _ in range(3):
                pipes.append(os.pipe())
                undo.callback(_close, pipes[-1])
            undo.pop_all()
        stdout, stderr, (theirs, ours) = pipes  # of the lifeline the worker has the end that is read
        return cls(stdout, stderr, (ours, theirs))

    @property
    def theirs(self) -> tuple[int, int, int]:
        """The worker's ends."""
        return self.stdout[1], self.stderr[1], self.lifeline[1]

    def hand_over(self) -> None:
        """Close the worker's ends, which it has by now."""
        _close(self.theirs)

    def close(self) -> None:
        """Close our ends."""
        _close((self.stdout[0], self.stderr[0], self.lifeline[0]))


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A process that leads a session, and the descriptor that tells its end."""

    child: Child
    exit_fd: int

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process itself; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.child.pid, number)

    def kill_group(self) -> None:
        """Kill the process and what it started, but for what left its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where only the dead are left
            os.killpg(self.child.pid, signal.SIGKILL)
        self.send(signal.SIGKILL)  # one that was forked a moment ago leads no group yet

    def returncode(self) -> int:
        """Return how it ended, as subprocess has it (-N: signal N), once `exit_fd` is readable."""
        if not hasattr(os, "waitid"):  # macOS before Python 3.13: reaps, and the pid is no longer safe
            return self.child.wait()
        end = os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def release(self, patience: float) -> None:
        """Kill what is left, reap, and close the descriptor.

        Args:
            patience: seconds that it has to end in, after which it is left unreaped.
        """
        self.kill_group()
        ready = select.poll()
        ready.register(self.exit_fd, select.POLLIN)
        if ready.poll(max(0.0, patience) * 1000):
            self.child.wait()
        os.close(self.exit_fd)


def start_worker(plan: WorkerPlan, pipes: Pipes, *, pidfd: bool = True) -> WorkerProcess:
    """Start a worker.

    Args:
        plan: what to start.
        pipes: what it writes to, and what ties it to this process.
        pidfd: watch it with a pidfd where the system has those; otherwise a thread waits for it.

    Raises:
        OSError: the process cannot be started.
    """
    command = plan.command_line(os.getpid(), pipes.lifeline[1])
    process = spawn(command, plan.environment, pipes, plan, _descriptors(plan, pipes))
    bind(process.pid, plan)
    return watched(process, pidfd=pidfd)


def bind(pid: int, plan: WorkerPlan) -> None:
    """Keep a worker that has just begun to its own cores, where it has some."""
    if plan.cores:
        with contextlib.suppress(OSError):  # it may have ended, and cores may be taken from a job while it runs
            os.sched_setaffinity(pid, plan.cores)


def _descriptors(plan: WorkerPlan, pipes: Pipes) -> list[int]:
    """What a worker has open from the start, besides its standard streams."""
    return [pipes.lifeline[1], *([] if plan.store_fd is None else [plan.store_fd])]


def spawn(
    command: Sequence[str], environment: Mapping[str, str], pipes: Pipes, plan: WorkerPlan, inherited: Sequence[int]
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own that writes to `pipes`; it has the descriptors `inherited` besides.

    It is the worker of `plan`, or what that and others are forked from.
    """
    with _blocked(signal.SIGUSR1):
        process = subprocess.Popen(
            command,
            # A single worker reads the terminal, as does one that a person debugs.
            stdin=None if plan.world_size == 1 or plan.has_terminal else subprocess.DEVNULL,
            stdout=None if plan.has_terminal else pipes.stdout[1],
            stderr=None if plan.has_terminal else pipes.stderr[1],
            env=dict(environment),
            pass_fds=inherited,
            start_new_session=True,
        )
    if plan.descriptors is not None:
        set_descriptor_limit(plan.descriptors, process.pid)
    return process


def watched(process: Child, *, pidfd: bool = True) -> WorkerProcess:
    """Watch a child; OSError where it cannot be."""
    return WorkerProcess(process, _exit_fd(process, pidfd))


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal in what is started: it would end a worker that does not handle it yet, and unblocks it then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _exit_fd(process: Child, pidfd: bool) -> int:
    """A descriptor that becomes readable when the child ends: a pidfd, or a pipe that a waiting thread closes."""
    # A kernel may refuse what the library has: before Linux 5.3, or in a sandbox.
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
