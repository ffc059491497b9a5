"""The processes of this machine's workers in one attempt: started together, signalled, and watched to their end.

Contract: an attempt calls `start` once, from the main thread, and reads their `pipes`; then the run's loop calls
`on_end(rank, status)` for each worker that ends, once. `remaining` are those that have not. `kill` ends them and what
they started, `give_up` forgets one that does not end even so. `release`, at the end, ends and reaps what is left.
Where several workers begin with the same imports (`shared_imports`), they are forked from one process after these, the
template (`forking`):
- Till then a signal to stop ends the template, and the workers count as ended by it. One to be passed on is kept.
- A template that does not come to forking, for whatever reason, is no failure. The workers are started one by one, and
  what is wrong shows in them.
What can go wrong: a worker cannot be started, which is a LaunchError, from `start` or from the loop's turn.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial

from allstep.errors import LaunchError
from allstep.launch.event_loop import STOP_SIGNALS, EventLoop
from allstep.launch.forking import Template
from allstep.launch.process import Pipes, WorkerProcess, start_worker
from allstep.launch.worker_plan import WorkerPlan


class Workers:
    """This machine's workers.

    Args:
        plans: what to start.
        loop: the run's event loop.
        on_end: called with a worker's rank and how it ended (-N: signal N).
        shared: the modules that they can import once, before they part; none starts each by itself.
    """

    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        loop: EventLoop,
        on_end: Callable[[int, int], object],
        shared: Sequence[str] = (),
    ) -> None:
        self.pipes: dict[int, Pipes] = {}
        self.remaining: list[int] = []
        self._plans = plans
        self._loop = loop
        self._on_end = on_end
        self._shared = shared
        self._template: Template | None = None
        self._ended_by: signal.Signals | None = None
        self._kept_signals: list[signal.Signals] = []
        self._processes: dict[int, WorkerProcess] = {}
        self._given_up: set[int] = set()
        self._have_ends = False

    def start(self) -> None:
        """Start the workers, or the process that they are to be forked from."""
        for plan in self._plans:
            try:
                self.pipes[plan.rank] = Pipes.open()
            except OSError as error:
                raise _not_started(plan, error) from error
            self.remaining.append(plan.rank)
        if self._shared:
            with contextlib.suppress(OSError):  # then each is started by itself, and an error there is told
                self._template = Template(self._plans, list(self.pipes.values()), self._shared)
        if self._template is None:
            self._start_each()
        else:
            self._loop.watch(self._template.process.exit_fd, self._go_on_without_template)

    def pid(self, rank: int) -> int:
        """The process of a worker, or that from which it is to be forked."""
        process = self._template.process if self._template is not None else self._processes[rank]
        return process.child.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all that have not ended."""
        if self._template is None:
            for process in self._running():
                process.send(number)
        elif number in STOP_SIGNALS:
            self._end_template(number)
        elif number != signal.SIGCONT:  # which would mean nothing to workers that do not run yet
            self._kept_signals.append(number)

    def kill(self) -> None:
        """Kill all that have not ended, and what they started."""
        if self._template is not None:
            self._end_template(signal.SIGKILL)
        for process in self._running():
            process.kill_group()

    def give_up(self, rank: int) -> None:
        """Wait for a worker no longer."""
        self.remaining.remove(rank)
        self._given_up.add(rank)
        if self._template is None:
            self._loop.forget(self._processes[rank].exit_fd)
        elif not self.remaining:
            self._loop.forget(self._template.process.exit_fd)

    def sweep(self) -> None:
        """Kill what the workers started and left."""
        for process in self._processes.values():  # ended ones too: their pids stay theirs until they are reaped
            process.kill_group()

    def release(self, patience: float) -> None:
        """Kill all that is left, reap it, and close the pipes.

        Args:
            patience: seconds for all together that have not been given up.
        """
        until = time.monotonic() + patience
        if self._template is not None:
            self._loop.forget(self._template.process.exit_fd)
            # A worker that was given up before it was forked stands for the whole template.
            self._template.abandon(0.0 if self._given_up else patience)
        self.sweep()
        for rank, process in self._processes.items():
            if rank in self.remaining:
                self._loop.forget(process.exit_fd)
            process.release(0.0 if rank in self._given_up else until - time.monotonic())
        self._hand_over_pipes()
        for pipes in self.pipes.values():
            pipes.close()

    def _running(self) -> list[WorkerProcess]:
        return [process for rank, process in self._processes.items() if rank in self.remaining]

    def _end_template(self, number: signal.Signals) -> None:
        assert self._template is not None
        self._ended_by = self._ended_by or number
        self._template.process.kill_group()

    def _go_on_without_template(self) -> None:
        """The template has ended: adopt the workers that it forked, or start each by itself."""
        template, self._template = self._template, None
        assert template is not None
        self._loop.forget(template.process.exit_fd)
        if self._ended_by is not None:
            template.abandon(0.0)
            for rank in self.remaining.copy():
                self.remaining.remove(rank)
                self._on_end(rank, -self._ended_by)
            return
        processes = template.adopt()
        if processes is None:
            self._start_each()
        else:
            for plan, process in zip(self._plans, processes, strict=True):
                self._watch(plan.rank, process)
            self._hand_over_pipes()
        for number in self._kept_signals:
            self.send(number)

    def _start_each(self) -> None:
        for plan in self._plans:
            try:
                process = start_worker(plan, self.pipes[plan.rank])
            except OSError as error:
                raise _not_started(plan, error) from error
            self._watch(plan.rank, process)
        self._hand_over_pipes()

    def _watch(self, rank: int, process: WorkerProcess) -> None:
        self._processes[rank] = process
        self._loop.watch(process.exit_fd, partial(self._end, rank))

    def _end(self, rank: int) -> None:
        process = self._processes[rank]
        self._loop.forget(process.exit_fd)
        self.remaining.remove(rank)
        self._on_end(rank, process.returncode())

    def _hand_over_pipes(self) -> None:
        """Close the workers' ends here once, so that a pipe ends when its worker and what that started have ended."""
        if not self._have_ends:
            self._have_ends = True
            for pipes in self.pipes.values():
                pipes.hand_over()


def _not_started(plan: WorkerPlan, error: OSError) -> LaunchError:
    return LaunchError(f"rank {plan.rank} of {plan.world_size} could not be started: {error}")
