"""The record of a run that this machine leads (`allstep.run_record`), as the head keeps it.

Contract: the head makes one `HeadRecord` for a run. It calls `open` whenever an attempt has its folder, `attempt`
around each attempt, `attempt_ended` within that, and `ended` at the run's end. Signals are noted as they come. A run
without a folder has no record, and then none of these does anything. Nothing here raises because of the record.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from allstep.diagnosis.root_cause import Diagnosis
from allstep.exit_codes import PREEMPTED
from allstep.launch.folder import AttemptFolder
from allstep.launch.machine import Machine
from allstep.launch.worker_plan import Share
from allstep.monitor.hub import Hub
from allstep.monitor.run_watch import RunWatch, summary_of
from allstep.placement.slurm import job_of_process
from allstep.protocol.messages import CheckpointSaved
from allstep.run_record.process_identity import identity_of
from allstep.run_record.recorder import Outcome, RunRecorder, about_run

LAUNCHER = "allstep"


class HeadRecord:
    """The record of one run.

    Args:
        machine: this one.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._recorder: RunRecorder | None = None
        self._folder: AttemptFolder | None = None
        self._watch: RunWatch | None = None
        self._job = job_of_process(machine.launch.environ) or ""

    def open(self, folder: AttemptFolder | None) -> None:
        """The next attempt has this folder, or none."""
        self._folder = folder
        if folder is None or self._recorder is not None:
            return
        command = self._machine.launch.command
        about = about_run(
            name=folder.name,
            run_id=folder.name,
            launcher=LAUNCHER,
            command=[*(["-m"] if command.module else []), command.target, *command.arguments],
            process=identity_of(os.getpid()),
            job=self._job,
        )
        path = folder.path.absolute().parent
        self._recorder = recorder = RunRecorder(path, about, secrets=self._machine.secrets, warn=self._machine.say)
        self._machine.signalled = lambda number: recorder.signalled(number.name)

    @property
    def saved(self) -> Callable[[CheckpointSaved], None] | None:
        """What the hub is to call with each checkpoint."""
        return None if self._recorder is None else self._recorder.saved

    @contextlib.contextmanager
    def attempt(self, share: Share, hub: Hub) -> Iterator[None]:
        """Record an attempt for the length of a with block, as the run's loop turns."""
        recorder = self._recorder
        if recorder is None:
            yield
            return
        recorder.attempt_began(
            share.attempt,
            world=share.world_size,
            nodes=share.nodes,
            launcher=LAUNCHER,
            process=identity_of(os.getpid()),
            job=self._job,
        )
        self._watch = watch = RunWatch(recorder, hub, share.world_size)
        self._machine.loop.add_timer(watch)
        try:
            yield
        finally:
            self._machine.loop.remove_timer(watch)

    def attempt_ended(self, status: int, diagnosis: Diagnosis | None, *, stopped: bool) -> None:
        """No worker of the attempt is left.

        Args:
            status: its exit status.
            diagnosis: of its failure, if it failed.
            stopped: a signal stopped it.
        """
        if self._recorder is None or self._watch is None:
            return
        self._watch.finish()
        if diagnosis is not None and not stopped:
            report = self._folder.failure if self._folder is not None else None
            self._recorder.failed(summary_of(diagnosis, report))
        self._recorder.attempt_ended(outcome_of_status(status, stopped=stopped), status)

    def ended(self, status: int, *, stopped: bool, why: str = "") -> None:
        """No further attempt follows; `why` where no attempt says it."""
        if self._recorder is not None:
            self._recorder.ended(outcome_of_status(status, stopped=stopped), status, why)


def outcome_of_status(status: int, *, stopped: bool) -> Outcome:
    """How an attempt, or a run, ended that had this exit status."""
    if status == 0:
        return "finished"
    if stopped:
        return "stopped"
    return "preempted" if status == PREEMPTED else "failed"
