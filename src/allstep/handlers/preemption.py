"""`Preemption`: a signal ends the run on all ranks with everything saved, so that it can be started again.

Contract: attached from the main thread to the engine that trains, beside a `Checkpoint` that is attached to it. A
signal to any rank, SIGTERM or SIGUSR1, stops all of them after the same iteration. The checkpoint saves there and waits
until that is committed. Then `Engine.run` raises `Preempted`, with which the process ends with exit code 85; with
`requeue` the SLURM job is put back into its queue first.

A run that was complete when the stop held ends as if there had been no signal, and so does one that was ended as
finished. An end that others asked for at the same time, such as a `TimeLimit`, changes nothing.

A second signal also ends the engines in `hurries`, such as an evaluator that runs in the trainer's handler. A save that
is under way, and the one at the iteration where the run stops, are still committed. A third signal kills, as it does by
default: the save under way is lost, and the newest committed checkpoint is as it was.

What can go wrong: a step that hangs never stops. Where requeueing the job fails, the log says so and the process ends
with exit code 85 all the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable

from allstep.engine import Engine, Events
from allstep.errors import Preempted
from allstep.exit_codes import PREEMPTED
from allstep.handlers.stop_on_signal import TOGETHER_S, StopOnSignal
from allstep.placement.slurm import requeue_command
from allstep.protocol.save_record import SAVES

_REQUEUE_TIMEOUT_S = 30  # as long as SLURM waits by default before it kills what it has signalled (KillWait)


class Preemption(StopOnSignal):
    """Ends a run whose devices the scheduler wants, with exit code 85.

    Args:
        requeue: put the SLURM job back into its queue; without effect outside SLURM, and under `allstep submit`, which
            does so by itself. For signals that come before the
            job's time is up (`sbatch --signal`); a job that SLURM itself preempts is requeued by it.
        hurries: engines that a second signal ends as well.
        signals: as for `StopOnSignal`.
        together: as for `StopOnSignal`.
    """

    outcome = "preempted"

    def __init__(
        self,
        *,
        requeue: bool = False,
        hurries: Iterable[Engine] = (),
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1),
        together: float = TOGETHER_S,
    ) -> None:
        super().__init__(signals, hurries=hurries, together=together)
        self.requeue = requeue

    def attach(self, engine: Engine) -> Preemption:
        """Listen on behalf of `engine`; returns self, for use in a `with` statement. Errors as in `StopOnSignal`."""
        super().attach(engine)
        self._handles.append(engine.add_event_handler(Events.TERMINATE, self._leave))
        self._handles.append(engine.add_event_handler(Events.COMPLETED, self._requeue))
        return self

    def _leave(self, engine: Engine) -> None:
        if engine.state.outcome == "preempted" and not engine.extension.is_complete:
            engine.extension.leave_with(Preempted(PREEMPTED))

    def _requeue(self, engine: Engine) -> None:
        """Give the job back, once: SLURM then ends it. Everything was saved in TERMINATE."""
        if not self.requeue or engine.coordinator.rank or not isinstance(engine.extension.leaving, Preempted):
            return
        command = requeue_command(os.environ)
        # Under `allstep submit` the job's own process requeues, as it knows whether that got anywhere.
        if command is None or SAVES in os.environ:
            return
        # The run is saved: nothing that fails here may keep the process from ending with its status.
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_REQUEUE_TIMEOUT_S)
            failure = done.stderr.strip() if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error)
        if failure is None:
            engine.logger.info("SLURM job %s is put back into its queue", command[-1])
        else:
            engine.logger.error("%s failed: %s; start the job again by hand", " ".join(command), failure)
