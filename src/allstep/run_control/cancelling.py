"""Ending a run: with a save first, or at once.

Contract: `cancel` tells a run to end and says in one line what was done; it does not wait until the ranks have left.
With a save first, the run is told as its scheduler would tell it, so that a script with `allstep.Preemption` or
`StopOnSignal` stops on all ranks at one iteration and saves. Who is told:
- a SLURM job that waits: it is taken out of the queue.
- a job of `allstep submit` that runs: its own process gets SIGUSR1, and is told before, in its record, that it is not
  to be started again.
- what runs on this machine: the process that the record names gets SIGTERM. That is the supervisor of `allstep run`,
  the agent of torchrun, or rank 0. The first two kill what has not left when their time of grace is over.
- another SLURM job: the tasks of its steps get SIGUSR1. A script that requeues its job itself
  (`Preemption(requeue=True)`) has then to be cancelled once more, as a job that waits.
Without a save: `scancel`. On this machine a supervisor gets SIGTERM again and again, of which the second ends its
workers at once; of torchrun's agent the ranks are killed, and of another launcher rank 0, whose sidecar then ends the
others. A process is signalled only where it is sure to be the one that the record means.

What can go wrong, each a RunControlError: the run is over; SLURM does not answer or refuses; the process is on another
machine; it does not go.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import psutil

from allstep.errors import RunControlError
from allstep.run_control.run_search import FoundRun
from allstep.run_control.run_status import OVER, RunStatus
from allstep.run_record.process_identity import is_alive
from allstep.submission import slurm_commands
from allstep.submission.job_record import JobRecord

GONE_S = 20.0
"""Seconds in which a launcher has to be gone that ends its workers at once."""

_AGAIN_S = 0.5


def cancel(run: FoundRun, status: RunStatus, *, now: bool) -> str:
    """End a run, and say what was done.

    Args:
        run: which.
        status: how it is.
        now: without a save.

    Raises:
        RunControlError: it cannot be ended from here.
    """
    if status.state in OVER and status.state != "silent":
        raise RunControlError(f"run {status.run} is over: {status.state}{f', {status.why}' if status.why else ''}")
    last = run.history.last
    process = last.process if last is not None else {}
    alive = is_alive(process)
    # A run in a shell that SLURM gave is ended by its process, which leaves the shell.
    if status.job and (run.is_submitted or not alive):
        return _cancel_job(run, status, now=now)
    if alive is None:
        raise RunControlError(
            f"run {status.run} was started on {process.get('host', 'another machine')}, whose processes cannot be "
            "reached from here; run allstep cancel there"
        )
    if not alive:
        raise RunControlError(f"run {status.run} is over: its launcher (pid {process['pid']}) is gone")
    return _kill(status, process) if now else _tell(status.run, process["pid"])


def _cancel_job(run: FoundRun, status: RunStatus, *, now: bool) -> str:
    job = status.job
    if status.state == "unknown":
        raise RunControlError(f"run {status.run} was not cancelled: {status.why}")
    if now or status.state == "queued":
        failure = slurm_commands.cancel(job)
        done = f"run {status.run}: job {job} is cancelled"
    else:
        if run.is_submitted:
            try:
                JobRecord(run.folder).cancel()  # before the signal, so that it is there when the job has stopped
            except OSError as error:
                raise RunControlError(
                    f"run {status.run} was not cancelled: {run.folder} cannot be written, so that the job would be "
                    f"requeued: {error.strerror}; --now cancels it without a save"
                ) from error
        failure = slurm_commands.give_notice(job, batch=run.is_submitted)
        done = f"run {status.run}: job {job} is told to save and stop"
    if failure is not None:
        raise RunControlError(f"run {status.run} was not cancelled: {failure}")
    return done


def _tell(name: str, pid: int) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    return f"run {name}: process {pid} is told to save and stop (SIGTERM)"


def _kill(status: RunStatus, process: dict[str, Any]) -> str:
    pid = process["pid"]
    ranks = _children(pid) if status.launcher == "torchrun" else []
    number = signal.SIGTERM if status.launcher in ("allstep", "torchrun") else signal.SIGKILL
    until = time.monotonic() + GONE_S
    while is_alive(process):
        if time.monotonic() > until:
            raise RunControlError(f"run {status.run}: process {pid} has not ended within {GONE_S:g} s of SIGTERM")
        with contextlib.suppress(ProcessLookupError):
            # The agent is told once: at a second SIGTERM it would leave its ranks behind.
            if status.launcher != "torchrun" or ranks:
                os.kill(pid, number)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        ranks = []
        time.sleep(_AGAIN_S)  # nobody tells when a process ends that is not a child
    return f"run {status.run}: process {pid} is gone, and its ranks with it"


def _children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children()
    return []
