"""One attempt on this machine: its workers started, watched, told to leave, ended.

Contract: `run` is called once, from the main thread, after `start`. It returns when no worker of this machine is left
that can be ended, nor anything in a worker's process group, and monitoring has said that the attempt is over on all
machines. Then `diagnosis` is the failure, or None; `stopped_by` the signal that stopped the attempt, or None; `ends`
says how each worker ended. What happens in it:
- All workers exit with 0: success.
- Monitoring settles on a failure or a hang. It orders the other ranks to leave. A worker that has not left after
  `LEAVE` seconds is killed, because a pending gloo collective cannot be aborted. SIGTERM is not used for this: it means
  preemption.
- A worker exits as preempted (85) while others of this machine go on: it is named; monitoring decides what follows.
- A signal to stop (`handle_signal`) is passed on (SIGINT as such, the others as SIGTERM), then SIGCONT, so that a
  worker that was stopped can act on it. After `grace` seconds, or a second signal, SIGKILL. Other machines are waited
  for `REMOTE` seconds longer, and after a second signal not at all. SIGUSR1 and SIGUSR2 are passed on.
- A worker does not end after SIGKILL (the kernel waits in it for a device or a file system): it is left behind after
  `KILLED` seconds, and a line says so.
- Descendants of workers hold their output open: it is read for `LINGER` seconds after the last worker's end, then they
  are killed.
What can go wrong: a worker cannot be started; `start` raises LaunchError, and `close` ends those that were.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.diagnosis.report import straggler_line
from allstep.diagnosis.root_cause import Diagnosis
from allstep.errors import LaunchError
from allstep.exit_codes import PEER_LOST, PREEMPTED
from allstep.launch.event_loop import FORWARDED_SIGNALS, STOP_SIGNALS, EventLoop
from allstep.launch.folder import AttemptFolder
from allstep.launch.output import RankOutput, RankStreams, Terminal
from allstep.launch.worker_plan import WorkerPlan
from allstep.launch.workers import Workers
from allstep.monitor.memory import MemoryWatch
from allstep.monitor.service import AllEnded, MonitorEvent, Service, StragglerSeen, Verdict
from allstep.protocol.messages import Finish, Leave
from allstep.protocol.registration import spans
from allstep.protocol.worker_exit import WorkerExit

LEAVE = 1.0
"""Seconds that peers of a failed worker have to leave."""

ALONE = 5.0
"""Seconds after a worker was preempted in which the others can be too, before it is said that it was alone."""

KILLED = 10.0
"""Seconds after SIGKILL in which a worker's process has to end."""

LINGER = 1.0
"""Seconds for which output is read after the last worker has ended."""

REMOTE = 10.0
"""Seconds after a verdict, or after the grace of a signal to stop, in which the other machines can say how their
workers ended; less where one is lost.
"""


class Attempt:
    """The workers of this machine in one attempt.

    Args:
        plans: the workers to start.
        monitor: the service that the ranks report to, whose sockets are in the loop; it is left open.
        loop: the run's event loop.
        terminal: where output is shown.
        folder: where their logs go, or None for no logs.
        shown: the ranks whose output is passed on.
        grace: seconds between a signal to stop and SIGKILL.
        relayed: another machine decides; a verdict here then means that it was lost.
        shared: the modules that the workers can import once, before they part.
    """

    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        monitor: Service,
        *,
        loop: EventLoop,
        terminal: Terminal,
        folder: AttemptFolder | None,
        shown: frozenset[int],
        grace: float,
        relayed: bool = False,
        shared: Sequence[str] = (),
    ) -> None:
        self.stopped_by: signal.Signals | None = None
        self.diagnosis: Diagnosis | None = None
        self.finished: Finish | None = None
        self.ends: dict[int, WorkerExit] = {}
        self.streams = RankStreams(loop, terminal)
        self._plans = plans
        self._monitor = monitor
        self._loop = loop
        self._terminal = terminal
        self._folder = folder
        self._shown = shown
        self._grace = grace
        self._relayed = relayed
        self._workers = Workers(plans, loop, self._note_end, shared)
        self._killed: set[int] = set()
        self._kill_at: float | None = None
        self._leave_behind_at: float | None = None
        self._give_up_at: float | None = None
        self._say_preempted_at: float | None = None
        self._over = False  # on all machines, or no longer waited for
        self._interrupted = False
        self._memory = MemoryWatch()

    def start(self) -> None:
        """Start the workers."""
        # Logs are opened first: where one cannot be, nothing has to be ended.
        outputs = {plan.rank: self._output(plan) for plan in self._plans}
        self._workers.start()
        for rank, pipes in self._workers.pipes.items():
            self.streams.open(rank, {"stdout": pipes.stdout[0], "stderr": pipes.stderr[0]}, outputs[rank])

    def run(self) -> None:
        """Watch the workers to their end, and the attempt to its end everywhere."""
        # Other machines' workers may go on when this one's have ended.
        while self._workers.remaining or not self._over:
            self._turn()
        self._linger()

    def handle_signal(self, number: signal.Signals) -> None:
        """Act on a signal to the supervisor."""
        self._interrupted = self._interrupted or number in STOP_SIGNALS
        if number in FORWARDED_SIGNALS:
            self._workers.send(number)
        elif self.stopped_by is None and self.diagnosis is None:
            self._stop(number)  # after a verdict the workers are leaving already, so a signal ends them
        else:
            self._give_up(0.0)
            self._kill()

    def killed(self) -> tuple[int, ...]:
        """The ranks that had to be killed."""
        return tuple(sorted(rank for rank, end in self.ends.items() if end.killed))

    def close(self) -> None:
        """Kill what is left, and let go of pipes and logs."""
        self._workers.kill()
        self._workers.sweep()
        self.streams.close()
        self._workers.release(KILLED)

    def _output(self, plan: WorkerPlan) -> RankOutput:
        try:
            return RankOutput(
                plan.rank,
                self._terminal.outputs if plan.rank in self._shown else {},
                prefixed=plan.world_size > 1,
                coloured=self._terminal.coloured,
                log=self._folder.log(plan.rank) if self._folder is not None else None,
                warn=self._terminal.say,
            )
        except OSError as error:
            raise LaunchError(f"the log of rank {plan.rank} of {plan.world_size} cannot be written: {error}") from error

    def _turn(self, until: float | None = None) -> None:
        """Wait for the next event or deadline, and act on what is due."""
        self._terminal.adjust()
        self.streams.adjust()
        own = (self._kill_at, self._leave_behind_at, self._give_up_at, self._say_preempted_at)
        times = (until, *own, self._monitor.deadline())
        self._loop.turn(min((at for at in times if at is not None), default=None))
        now = time.monotonic()  # once, so that what is due together is acted on together
        if (tick_at := self._monitor.deadline()) is not None and now >= tick_at:
            self._monitor.tick()
        for event in self._monitor.take():
            self._handle_event(event)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill()
        if self._leave_behind_at is not None and now >= self._leave_behind_at:
            self._leave_behind()
        if self._give_up_at is not None and now >= self._give_up_at:
            self._give_up_at, self._over = None, True
        if self._say_preempted_at is not None and now >= self._say_preempted_at:
            self._say_who_was_preempted()

    def _handle_event(self, event: MonitorEvent) -> None:
        if isinstance(event, Verdict) and self.diagnosis is None:
            self.diagnosis = event.diagnosis
            # A machine that was lost tells nothing more. Where another decides, a verdict here is that it was lost.
            lost = event.diagnosis.cause.kind is OutcomeKind.NODE_LOST
            self._give_up(0.0 if self._relayed else 2 * LEAVE if lost else REMOTE)
            if self.stopped_by is None:  # else they have been told by a signal, and may be saving
                self._monitor.order_leave(f"rank {event.diagnosis.cause.rank} failed first", PEER_LOST)
            self._kill_soon()
        elif isinstance(event, Leave):
            self._kill_soon()
        elif isinstance(event, StragglerSeen):
            self._terminal.say(straggler_line(event.rank, event.ratio))
        elif isinstance(event, AllEnded):
            self._over = True
        elif isinstance(event, Finish):
            self.finished = event
            self._over = True
            self._kill_soon()

    def _stop(self, number: signal.Signals) -> None:
        self.stopped_by = number
        self._kill_at = time.monotonic() + self._grace
        self._give_up(self._grace + REMOTE)
        if self._workers.remaining:
            self._terminal.say(
                f"{number.name}: passed on to the workers, which have {self._grace:g} s to leave; "
                "a second signal ends them at once"
            )
        else:
            self._terminal.say(
                f"{number.name}: no worker is left here; the other machines have {self._grace + REMOTE:g} s to end; "
                "a second signal ends the wait"
            )
        # Ctrl-C stays Ctrl-C, since scripts expect KeyboardInterrupt. SIGHUP and SIGQUIT would end Python at once.
        self._workers.send(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        self._workers.send(signal.SIGCONT)

    def _give_up(self, after: float) -> None:
        """Wait for the other machines for so many seconds more at the most."""
        at = time.monotonic() + after
        self._give_up_at = at if self._give_up_at is None else min(at, self._give_up_at)

    def _kill_soon(self) -> None:
        """Kill after `LEAVE` seconds; a signal to stop gave the workers a time of their own."""
        if self.stopped_by is None:
            self._kill_at = min(self._kill_at or float("inf"), time.monotonic() + LEAVE)

    def _kill(self) -> None:
        self._kill_at = None
        if self._workers.remaining:
            self._killed |= set(self._workers.remaining)  # before, so that their ends are known to be ours
            self._workers.kill()
            self._leave_behind_at = self._leave_behind_at or time.monotonic() + KILLED

    def _leave_behind(self) -> None:
        """Go on without the workers that were killed and whose processes do not end."""
        self._leave_behind_at = None
        for rank in self._workers.remaining.copy():
            # The pid is told so that a person can see what the process waits for.
            self._terminal.say(
                f"rank {rank} was killed, and its process (pid {self._workers.pid(rank)}) does not end; going on "
                "without it"
            )
            self._workers.give_up(rank)
            self._take_end(rank, -signal.SIGKILL, "its process does not end")

    def _note_end(self, rank: int, code: int) -> None:
        self._take_end(rank, code)
        if code == PREEMPTED and self.diagnosis is None and self.stopped_by is None:
            self._say_preempted_at = time.monotonic() + ALONE

    def _take_end(self, rank: int, code: int, note: str = "") -> None:
        self.streams.drain(rank)  # its end may be seen before its last output was read
        words = self.streams.last_words(rank)
        # A worker that ended by itself before its SIGKILL came was not killed.
        killed = rank in self._killed and code == -signal.SIGKILL
        note = note or self._memory.note(code, words, killed=killed)
        self.ends[rank] = WorkerExit(rank, code, killed, words, note)
        self._monitor.worker_ended(self.ends[rank])

    def _say_who_was_preempted(self) -> None:
        self._say_preempted_at = None
        left = [rank for rank, end in self.ends.items() if end.returncode == PREEMPTED]
        stay = self._workers.remaining
        if stay and self.diagnosis is None:
            go_on = "goes on" if len(stay) == 1 else "go on"
            were = "was" if len(left) == 1 else "were"
            self._terminal.say(f"{_ranks(left)} {were} preempted (exit code {PREEMPTED}), and {_ranks(stay)} {go_on}")

    def _linger(self) -> None:
        """Read on until the pipes end, `LINGER` has passed, or a signal says that nobody cares."""
        until = time.monotonic() + LINGER
        self._interrupted = False  # signals until now were about the workers
        while not self.streams.ended and not self._interrupted and time.monotonic() < until:
            self._turn(until)
        self._workers.sweep()


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"
