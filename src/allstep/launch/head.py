"""The machine that decides: it begins attempts, has the other machines do their share, and reports.

Contract: `lead` returns the run's exit status: that of the first cause, 128 + N where signal N stopped the run, 85
where workers were preempted and none failed. In a loop:
1. With several machines, wait until all have come.
2. Make the folder of the next attempt. Each attempt has a number, folder, port and key that no other has, so nothing
   that an earlier attempt left can be taken for its own. The run's record lies beside these folders.
3. Run the attempt everywhere: a `Hub` monitors all ranks, and this machine runs its own share.
4. Look at how it ended. An attempt that failed is followed by another as `decide_restart` says; a signal to stop ends
   that. The report is shown whether or not it can also be written.
What can go wrong before the first worker runs: the folder cannot be made, other machines do not come or do not fit, or
a worker cannot be started; each is a LaunchError.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from allstep.diagnosis.hang import HangLimits
from allstep.diagnosis.rank_outcome import OutcomeKind
from allstep.diagnosis.report import cause_line, failure_json, failure_text
from allstep.diagnosis.root_cause import Diagnosis
from allstep.errors import LaunchError
from allstep.exit_codes import LAUNCHER_ERROR, PEER_LOST, PREEMPTED
from allstep.launch.attempt import Attempt
from allstep.launch.environment import ReservedPort
from allstep.launch.folder import AttemptFolder, create_attempt
from allstep.launch.head_record import HeadRecord
from allstep.launch.machine import Machine
from allstep.launch.worker_plan import Share
from allstep.monitor.hub import Hub
from allstep.monitor.service import MonitorSettings
from allstep.protocol.address import EVERYWHERE, HERE, join_address, listen, new_key
from allstep.protocol.masking import mask, mask_all
from allstep.protocol.private_files import write_private_json

if TYPE_CHECKING:
    from allstep.launch.join_server import NodeAssembly

INFORM = 3.0
"""Seconds that other machines have to hear how the attempt or run ended."""


def lead(machine: Machine) -> int:
    """Run attempts until one succeeds or no further is to be begun."""
    with contextlib.closing(_HeadMachine(machine)) as head:
        return head.run()


class _HeadMachine:
    """A run as the deciding machine sees it: which attempt it is at, and what those before came to."""

    def __init__(self, machine: Machine) -> None:
        launch = machine.launch
        self._machine = machine
        self._settings = launch.settings
        self._limits = HangLimits.parse(launch.settings.limits or launch.environ.get("ALLSTEP_LIMITS", ""))
        self._failed: list[FailedAttempt] = []
        self._assembly = _open_assembly(machine) if launch.nodes is not None else None
        self._name = launch.name
        self._folder: AttemptFolder | None = None
        self._number = -1
        self._last_status = 0
        self._record = HeadRecord(machine)

    def run(self) -> int:
        try:
            status = self._run_attempts()
        except LaunchError as error:
            self._record.ended(LAUNCHER_ERROR, stopped=False, why=str(error))
            raise
        self._record.ended(status, stopped=self._machine.stopped())
        return status

    def _run_attempts(self) -> int:
        status: int | None = None
        while status is None:
            if self._assembly is not None:
                refusal = self._assembly.complete()
                # Machines that do not come back after a failure do not hide that failure's exit status.
                if refusal and self._failed:
                    self._machine.say(f"no further attempt: {refusal}")
                    return self._last_status
                if refusal:
                    raise LaunchError(refusal)
            if self._settings.preflight and not self._failed and not self._machine.stopped():
                self._preflight()
            if self._machine.stopped():
                return self._stopped()
            self._next_folder()
            status = self._run_attempt()
        return status

    def _preflight(self) -> None:
        """Find out who is fit, and go on without whom the run can do without."""
        from allstep.launch.preflight_rounds import preflight  # most runs do without it

        try:
            left_out = preflight(self._machine, self._assembly)
        except LaunchError as error:
            if self._assembly is not None:
                self._assembly.refuse(str(error))
            raise
        if left_out and self._assembly is not None:
            self._assembly.leave_out(left_out, f"run {self._name}: this machine is left out; node 0 says why")

    def close(self) -> None:
        if self._assembly is not None:
            self._assembly.close()

    def _next_folder(self) -> None:
        """Choose the attempt's number and make its folder, for whose lack only a first attempt can fail."""
        runs = Path(self._settings.runs or "runs")
        first = self._number < 0
        named = self._settings.name is not None or not first  # by now a name that was made up is this run's
        try:
            # Once a run goes on without logs it does so to its end; its attempts are then counted from there.
            folder = create_attempt(runs, self._name, named=named) if first or self._folder is not None else None
        except OSError as error:
            reason = f"no log can be written to {runs}/{self._name}: {error.strerror}"
            if first and (self._settings.name is not None or self._settings.runs is not None):
                raise LaunchError(f"{reason}; choose another place with --runs") from error
            self._machine.say(f"warning: {reason}; going on without logs (--runs chooses another place)")
            folder = None
        self._folder = folder
        self._name = folder.name if folder is not None else self._name
        self._number = folder.attempt if folder is not None else self._number + 1
        self._record.open(folder)

    def _run_attempt(self) -> int | None:
        """Run one attempt everywhere; return the run's exit status, or None where another is to follow."""
        several = self._assembly is not None
        key = self._assembly.new_attempt_key() if self._assembly is not None else new_key()
        # Without other machines nothing outside this one can reach the services.
        host = EVERYWHERE if several else HERE
        with ReservedPort(host) as reserved, contextlib.ExitStack() as stack:
            listener = listen(host)
            channel_port = listener.getsockname()[1]
            share = self._share(key, channel_port, reserved)
            limits = self._limits
            settings = MonitorSettings(key, self._number, share.world_size, limits, saved=self._record.saved)
            hub = Hub(self._machine.loop.selector, listener, settings)
            stack.callback(hub.close)
            stack.enter_context(self._record.attempt(share, hub))
            if self._assembly is not None:
                self._assembly.start(share, channel_port, hub)
            attempt = self._machine.attempt(share, hub, self._folder)
            status = self._conclude(attempt, hub, share)
            self._record.attempt_ended(
                self._last_status if status is None else status,
                hub.diagnosis() or attempt.diagnosis,
                stopped=attempt.stopped_by is not None,
            )
            if self._assembly is not None:
                hub.finish("" if status is None else self._result_line(status), status or 0)
                self._inform_nodes(hub, self._assembly, status)
        return status

    def _share(self, key: str, channel_port: int, reserved: ReservedPort) -> Share:
        """This machine's part of the attempt; the other machines' follow from it."""
        launch = self._machine.launch
        nodes = launch.nodes
        # A run of a name that was used before begins with a higher attempt than 0.
        first = self._number if not self._failed else self._failed[0].number
        return Share(
            run_id=self._name,
            attempt=self._number,
            key=key,
            channel=join_address(HERE, channel_port),
            master_addr=nodes.host if nodes is not None else "127.0.0.1",
            master_port=reserved.port,
            store_fd=reserved.fileno(),
            workers=launch.workers,
            first_rank=0,
            world_size=self._assembly.world_size() if self._assembly is not None else launch.workers,
            node_rank=0,
            nodes=self._assembly.node_count() if self._assembly is not None else 1,
            max_restarts=first + self._settings.max_restarts,
            folder=self._folder.path if self._folder is not None else None,
        )

    def _inform_nodes(self, hub: Hub, assembly: NodeAssembly, status: int | None) -> None:
        """Let the other machines hear that the attempt is over, and after the last one, that the run is."""
        until = time.monotonic() + INFORM  # for both steps together; a machine that hangs must not hold the run
        while hub.backlog and time.monotonic() < until:
            self._machine.turn(until)
        if status is not None:
            assembly.over(status, self._result_line(status), until=until)

    def _conclude(self, attempt: Attempt, hub: Hub, share: Share) -> int | None:
        """Report how an attempt ended; return the run's exit status, or None where another attempt is to follow."""
        diagnosis = hub.diagnosis() or attempt.diagnosis
        if attempt.stopped_by is not None:
            # A rank that answers Ctrl-C with KeyboardInterrupt did as it was told; any other error is news.
            cause = diagnosis.cause if diagnosis is not None else None
            if diagnosis and cause and cause.kind is OutcomeKind.ERROR and "KeyboardInterrupt" not in cause.what:
                self._report(diagnosis, attempt, hub)
            return self._stopped(attempt, diagnosis)
        if diagnosis is None:
            return self._succeeded(hub)
        self._failed.append(FailedAttempt(self._number, _progress(hub, share.world_size), cause_line(diagnosis)))
        self._last_status = diagnosis.exit_code or PEER_LOST
        decision = decide_restart(
            self._failed, max_restarts=self._settings.max_restarts, stop_after=self._settings.stop_after
        )
        if decision.again and not self._machine.stopped():
            self._machine.say(f"attempt {self._number} failed: {self._failed[-1].summary}; {decision.reason}")
            self._write(diagnosis, attempt, hub)  # the whole report of each attempt is in its folder
            return None
        self._report(diagnosis, attempt, hub)
        if self._settings.max_restarts:
            for each in self._failed[:-1]:
                self._machine.say(f"attempt {each.number} had failed before: {each.summary}")
            number = self._machine.stopped_by
            reason = f"stopped by {number.name}" if decision.again and number is not None else decision.reason
            self._machine.say(f"not begun again: {reason}")
        return self._last_status

    def _succeeded(self, hub: Hub) -> int:
        """Say how an attempt without a failure ended; return the run's exit status."""
        if any(end.returncode == PREEMPTED for end in hub.ends().values()):
            self._machine.say(f"run {self._name} was preempted (exit code {PREEMPTED}); start it again to go on")
            return PREEMPTED
        if self._failed:
            restarts = len(self._failed)
            self._machine.say(f"run {self._name} succeeded after {restarts} restart{'s' if restarts > 1 else ''}")
        return 0

    def _stopped(self, attempt: Attempt | None = None, diagnosis: Diagnosis | None = None) -> int:
        """Say that a signal ended the run, in this attempt or between two; return the run's exit status."""
        number = attempt.stopped_by if attempt is not None else self._machine.stopped_by
        assert number is not None
        killed = attempt.killed() if attempt is not None else ()
        named = f"rank{'s' if len(killed) > 1 else ''} {', '.join(map(str, killed))}"
        self._machine.say(f"stopped by {number.name}" + (f"; {named} had to be killed" if killed else ""))
        # Ranks that answered the signal by saving their state say so by their exit code; a scheduler reads ours.
        preempted = attempt is not None and any(end.returncode == PREEMPTED for end in attempt.ends.values())
        if preempted and diagnosis is None:
            return PREEMPTED
        return 128 + number

    def _report(self, diagnosis: Diagnosis, attempt: Attempt, hub: Hub) -> None:
        text = failure_text(diagnosis, name=self._name, tails=_tails(attempt, hub), logs=self._logs(attempt))
        self._machine.say(text.rstrip("\n"))
        self._write(diagnosis, attempt, hub)

    def _write(self, diagnosis: Diagnosis, attempt: Attempt, hub: Hub) -> None:
        if self._folder is None:
            return
        report = failure_json(diagnosis, name=self._name, tails=_tails(attempt, hub), logs=self._logs(attempt))
        content = mask_all(report, self._machine.secrets)
        try:
            write_private_json(self._folder.failure, content)
        except OSError as error:
            self._machine.say(f"warning: {self._folder.failure} cannot be written: {error.strerror}")

    def _logs(self, attempt: Attempt) -> dict[int, Path]:
        return {rank: self._folder.log(rank) for rank in attempt.ends} if self._folder is not None else {}

    def _result_line(self, status: int) -> str:
        """How the run ended, in one line for the terminals of the other machines."""
        if status == 0:
            return f"run {self._name} ended on all nodes"
        if status == PREEMPTED:
            return f"run {self._name} was preempted (exit code {PREEMPTED}) on all nodes"
        why = f": {mask(self._failed[-1].summary, self._machine.secrets)}" if self._failed else ""
        return f"run {self._name} ended with exit code {status}{why}; node 0 has the report"


def _open_assembly(machine: Machine) -> NodeAssembly:
    from allstep.launch.join_server import NodeAssembly  # a run on one machine does without it

    return NodeAssembly(machine)


def _progress(hub: Hub, world_size: int) -> Progress:
    """How far the attempt came, or None where no rank came through `init`."""
    return hub.progress() if any(hub.status(rank) is not None for rank in range(world_size)) else None


def _tails(attempt: Attempt, hub: Hub) -> dict[int, str]:
    """The last output of each rank; of other machines' ranks only standard error, which is what they send."""
    # Where a worker of this machine ended, its pipes were read here, which is more than the hub was told.
    elsewhere = {rank: end.stderr for rank, end in hub.ends().items()}
    return elsewhere | {rank: attempt.streams.last_output(rank) for rank in attempt.ends}


Progress = tuple[int, int] | None
"""The furthest (epoch, iteration) that a rank of an attempt told; None where none came through `init`."""


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that failed: its number, how far it came, and its first cause in a few words."""

    number: int
    progress: Progress
    summary: str


@dataclass(frozen=True, slots=True)
class RestartDecision:
    """Whether to begin another attempt, and why."""

    again: bool
    reason: str


def decide_restart(failed: Sequence[FailedAttempt], *, max_restarts: int, stop_after: int) -> RestartDecision:
    """Decide whether a run that failed begins another attempt: a pure function of what its attempts came to.

    An attempt in which no rank came through `init` came no further than any other: whether the script does not get
    that far or does not use allstep cannot be told from here.

    Args:
        failed: this run's attempts in order, all failed; at least one.
        max_restarts: restarts that the run may take.
        stop_after: restarts in a row without progress after which it ends all the same.
    """
    restarts = len(failed) - 1
    if restarts >= max_restarts:
        return RestartDecision(False, f"{_times(restarts)} taken" if restarts else "no restarts were asked for")
    stalled = _stalled(failed)
    if stalled >= stop_after:
        return RestartDecision(False, f"{_times(stalled)} in a row {_where(_furthest(failed))}")
    return RestartDecision(True, f"restart {restarts + 1} of at most {max_restarts}")


def _stalled(failed: Sequence[FailedAttempt]) -> int:
    """Restarts since an attempt last came further than all before it."""
    furthest: Progress = None
    stalled = -1  # so that the first attempt, which is no restart, makes 0
    for attempt in failed:
        if attempt.progress is not None and (furthest is None or attempt.progress > furthest):
            furthest = attempt.progress
            stalled = 0
        else:
            stalled += 1
    return stalled


def _furthest(failed: Sequence[FailedAttempt]) -> Progress:
    return max((each.progress for each in failed if each.progress is not None), default=None)


def _where(furthest: Progress) -> str:
    if furthest is None:
        return (
            "ended before all ranks had come through allstep.init, so another would too; for a script that does not "
            "use allstep, give --stop-after a larger number"
        )
    epoch, iteration = furthest
    return f"got no further than epoch {epoch}, iteration {iteration}, so another would not either"


def _times(restarts: int) -> str:
    return f"{restarts} restart{'s' if restarts != 1 else ''}"
