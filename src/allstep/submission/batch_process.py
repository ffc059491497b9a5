"""The process that a batch script becomes: it runs the step, says when to stop, and requeues the job.

    python -m allstep.submission.batch_process --folder=DIR --script=FILE --margin=S [--chain] -- srun ...

Contract, in order:
1. It notes the start (`job_record`) and starts the `srun`. Where no save was measured yet, the run is asked to save
   once at its beginning (`allstep.protocol.save_record`).
2. It waits for the step's end, for a signal to itself, and for the time of the notice: the end of the job's time, as
   SLURM says it then, less `lead_seconds`. At a signal or at that time the step gets one SIGUSR1, at which all ranks
   stop after one iteration and save (`allstep.Preemption`).
   Where a later start of the job begins meanwhile, as when SLURM has lost a node's slurmd and what that started lives
   on, this one ends its step and leaves everything to the later one.
3. `judge` says how the step ended. Where it was stopped, the job goes back into its queue or, with --chain, on in a new
   job, unless another start would get no further or a person has cancelled it. A job that SLURM no longer calls running
   was cancelled or is being requeued by SLURM itself, and is left to it.

The exit code, which is the job's: 0 finished; 85 stopped, to go on; 93 stopped, and not to go on;
else the step's own.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from allstep.exit_codes import NEVER_AGAIN, PREEMPTED
from allstep.launch.event_loop import SignalPipe
from allstep.placement.slurm import job_of_process
from allstep.protocol.save_record import MEASURE
from allstep.run_record.recorder import note_requeue
from allstep.submission.job_record import JobRecord, another_start
from allstep.submission.lead_time import lead_seconds
from allstep.submission.slurm_commands import ask_end, ask_state, requeue, submit_next

_LOOK_S = 60.0
"""How often the record of saves and the job's end are looked at."""

_RECORD_LOOK_S = 10.0
"""How often it is looked whether a later start of the job has begun."""

_LEAVE_S = 30.0
"""Seconds that a step has to end in that is no longer the job's, before its srun is killed."""

SLURMS_NOTICE_S = 62.0
"""SLURM's own notice of the time's end, `--signal=...@1`, comes up to a minute before that second."""

_SETTLE_S = 3.0
"""Seconds in which an srun may still be starting its tasks, and would lose a signal for them."""

Ending = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class StopNotice:
    """That the step was told to stop.

    Args:
        used_up: because the job's time ends.
        saved: the step that was saved then.
    """

    used_up: bool
    saved: int


def judge(code: int, notice: StopNotice | None, saved: int) -> Ending:
    """Say how a step ended.

    Args:
        code: srun's exit code; negative for its own death by a signal.
        notice: what it was told.
        saved: the step that is saved now.
    """
    if code in (0, PREEMPTED):
        return "finished" if code == 0 else "stopped"
    if notice is None:
        return "failed"
    # SIGUSR1 ends what has no handler for it yet, as in the first moments of a start.
    if code in (-signal.SIGUSR1, 128 + signal.SIGUSR1):
        return "stopped"
    # A task that leaves with 85 has srun end the others, whose code may be the higher one.
    is_killed = code in (128 + signal.SIGKILL, 128 + signal.SIGTERM)
    return "stopped" if is_killed and saved > notice.saved else "failed"


class BatchProcess:
    """One start of a job.

    Args:
        folder: the run's, which has the record of all its starts.
        job: SLURM's number.
        script: the batch script, for the next job of a chain.
        margin: see `lead_seconds`.
        chain: go on in a new job.
    """

    def __init__(self, folder: Path, job: str, script: Path, *, margin: float, chain: bool) -> None:
        self._folder = folder
        self._record = JobRecord(folder)
        self._job = job
        self._script = script
        self._margin = margin
        self._chain = chain
        self._notice: StopNotice | None = None
        self._began = time.time()
        self._planned_end: float | None = None
        self._number = 0
        self._superseded_at: float | None = None

    def run(self, command: Sequence[str]) -> int:
        """Run the step and return the job's exit code."""
        nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
        self._record.begin(self._job, int(nodes) if nodes.isdecimal() else 1)
        self._number = len(self._record.starts())
        environ = dict(os.environ)
        environ.pop(MEASURE, None)
        if not self._record.saves():
            environ[MEASURE] = "1"
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:  # by the batch script, up to here
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        with SignalPipe() as signals, subprocess.Popen(command, env=environ) as step:
            code = self._watch(step, signals)
        return self._finish(code)

    def _watch(self, step: subprocess.Popen[bytes], signals: SignalPipe) -> int:
        """Wait for the step's end, and pass on at most one notice."""
        end = os.pidfd_open(step.pid)
        is_passed_on = False
        notice_at, look_at = self._notice_at(), time.time() + _LOOK_S
        try:
            while True:
                now = time.time()
                self._leave_to_a_later_start(step, now)
                if self._notice is None and now >= notice_at:
                    notice_at = self._notice_at()  # the limit may have been moved
                    if now >= notice_at:
                        self._note(used_up=True, why="the job's time ends")
                elif now >= look_at:
                    notice_at, look_at = self._notice_at(), now + _LOOK_S
                settled_at = self._began + _SETTLE_S
                if self._notice is not None and not is_passed_on and now >= settled_at:
                    step.send_signal(signal.SIGUSR1)
                    is_passed_on = True
                dates = [look_at, now + _RECORD_LOOK_S]
                if self._notice is None:
                    dates.append(notice_at)
                elif not is_passed_on:
                    dates.append(settled_at)
                ready, _, _ = select.select([end, signals.fd], [], [], max(0.0, min(dates) - now))
                if end in ready:
                    return step.wait()
                for number in signals.take():
                    if self._notice is None:
                        self._note(used_up=self._ends_within(SLURMS_NOTICE_S), why=f"signal {number.name}")
        finally:
            os.close(end)

    def _leave_to_a_later_start(self, step: subprocess.Popen[bytes], now: float) -> None:
        if self._superseded_at is None:
            if len(self._record.starts()) > self._number:
                self._superseded_at = now
                _say(f"start {self._number} of the job: a later start has begun, so this one ends")
                step.terminate()
        elif now > self._superseded_at + _LEAVE_S:
            step.kill()

    def _note(self, *, used_up: bool, why: str) -> None:
        self._notice = StopNotice(used_up, self._record.saved())
        _say(f"{why}: the run is told to save and stop")

    def _notice_at(self) -> float:
        """When to give the notice, by what is known now; infinity for a job without a limit."""
        end = ask_end(self._job)
        if end is None:
            return float("inf")
        self._planned_end = self._planned_end or end
        # In a short job there has to be time to train too.
        lead = min(lead_seconds(self._record.saves(), self._margin), (end - self._began) / 2)
        return end - lead

    def _ends_within(self, seconds: float) -> bool:
        """Whether the job's time ends so soon that a signal of SLURM's is about that."""
        end = ask_end(self._job)
        if end is None or (self._planned_end is not None and end < self._planned_end - 1):
            return False  # a job that is preempted ends after its grace time, whatever it had left
        return end - time.time() <= seconds

    def _finish(self, code: int) -> int:
        if self._superseded_at is not None:
            return PREEMPTED
        if self._notice is not None and code != 0 and self._record.is_cancelled:
            # However srun's code came about: a task that leaves first has it end the others.
            return self._end(NEVER_AGAIN, "stopped and not started again: it was cancelled")
        saved = self._record.saved()
        ending = judge(code, self._notice, saved)
        if ending != "stopped":
            exit_code = code if code >= 0 else 128 - code
            return self._end(exit_code, "finished" if ending == "finished" else f"failed with exit code {exit_code}")
        state = ask_state(self._job)
        if state not in ("RUNNING", None):
            return self._end(PREEMPTED, f"stopped; SLURM calls the job {state} and decides what becomes of it")
        used_up = self._notice is not None and self._notice.used_up
        refusal = another_start(self._record.starts(), saved, used_up=used_up)
        if refusal is not None:
            remedy = "give it more time, save more often (Checkpoint(every=...)), or attach allstep.Preemption"
            return self._end(NEVER_AGAIN, f"stopped and not started again: {refusal}; {remedy}")
        if self._chain:
            number, failure = submit_next(self._script, os.environ)
            if number is not None:
                return self._end(PREEMPTED, f"stopped; goes on in job {number}", goes_on=number)
            return self._end(PREEMPTED, f"stopped, and no next job could be submitted: {failure}; submit it by hand")
        failure_to_requeue = requeue(os.environ)
        if failure_to_requeue is None:
            return self._end(PREEMPTED, "stopped; the job is put back into its queue")
        remedy = "submit with --chain where the site permits no requeueing"
        return self._end(PREEMPTED, f"stopped, and scontrol requeue failed: {failure_to_requeue}; {remedy}")

    def _end(self, code: int, what: str, goes_on: str = "") -> int:
        _say(f"start {self._number} of the job: {what}")
        try:
            self._record.end(self._job, code, what)
            if code in (PREEMPTED, NEVER_AGAIN):
                note_requeue(self._folder, goes_on or self._job, code, what)
        except OSError as error:
            _say(f"the job's record cannot be written: {error}")
        return code


def main(argv: Sequence[str]) -> int:
    """Run a job's step as the command line says; the exit code is the job's."""
    parser = argparse.ArgumentParser(prog="python -m allstep.submission.batch_process", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--margin", type=float, required=True)
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(argv)
    job = job_of_process(os.environ) or ""
    process = BatchProcess(given.folder, job, given.script, margin=given.margin, chain=given.chain)
    return process.run(given.command)


def _say(line: str) -> None:
    print(f"allstep: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
