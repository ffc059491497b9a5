"""The machine that decides: it begins attempts, has the other machines do their share, and reports.

Contract: `lead` returns the run's exit status: that of the first cause, 128 + N where signal N stopped the run, 85
where workers made room in order and none failed. Each attempt has a number, folder, port and nonce that no other has,
so nothing that an earlier attempt left can be taken for its own. An attempt that failed is followed by another as
`restarts.decide` says; a signal to stop ends that. The report is shown whether or not it can also be written.
What can go wrong before the first worker runs: the folder cannot be made, other machines do not come or do not fit, or
a worker cannot be started; each is a LaunchError.

Whether a run that failed begins another attempt: a pure function of what its attempts came to.

Progress is the furthest (epoch, iteration) that a rank of an attempt told over the control channel. An attempt in which
no rank came through `init` told none, and came no further than any other: whether the script does not get that far or
does not use allstep cannot be told from here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from allstep.diagnosis.hang import Limits
from allstep.diagnosis.rank_outcome import Kind
from allstep.diagnosis.report import failure_json, failure_text, without_torchs_prefix, write_report
from allstep.diagnosis.root_cause import Diagnosis
from allstep.errors import LaunchError
from allstep.exit_codes import PEER_LOST, PREEMPTED
from allstep.launch.attempt import Attempt
from allstep.launch.environment import ReservedPort
from allstep.launch.folder import AttemptFolder, create_attempt
from allstep.launch.machine import Machine
from allstep.launch.worker_plan import Share
from allstep.monitor.hub import Hub
from allstep.protocol.address import EVERYWHERE, HERE, join_address, listen, new_nonce

if TYPE_CHECKING:
    from allstep.launch.join_server import NodeAssembly


TIDY = 3.0
"""Seconds that other machines have to come for the last word."""


def lead(machine: Machine) -> int:
    """Run attempts until one succeeds or no further is to be begun."""
    with contextlib.closing(_Leader(machine)) as leader:
        return leader.run()


class _Leader:
    def __init__(self, machine: Machine) -> None:
        launch = machine.launch
        self._machine = machine
        self._settings = launch.settings
        self._limits = Limits.parse(launch.settings.limits or launch.environ.get("ALLSTEP_LIMITS", ""))
        self._failed: list[FailedAttempt] = []
        self._gathering = _gathering(machine) if launch.nodes is not None else None
        self._name = launch.name
        self._folder: AttemptFolder | None = None
        self._number = -1
        self._last_status = 0

    def run(self) -> int:
        status: int | None = None
        while status is None:
            if self._gathering is not None:
                refusal = self._gathering.complete()
                if refusal and self._failed:
                    self._machine.say(f"no further attempt: {refusal}")
                    return self._last_status
                if refusal:
                    raise LaunchError(refusal)
            if self._machine.stopped():
                return self._stopped()
            self._next_folder()
            status = self._attempt()
        return status

    def close(self) -> None:
        if self._gathering is not None:
            self._gathering.close()

    def _next_folder(self) -> None:
        """Choose the attempt's number and make its folder, for whose lack only a first attempt can fail."""
        runs = Path(self._settings.runs or "runs")
        first = self._number < 0
        named = self._settings.name is not None or not first
        try:
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

    def _attempt(self) -> int | None:
        """Run one attempt everywhere; return the run's exit status, or None where another is to follow."""
        nonce = new_nonce()
        several = self._gathering is not None
        with ReservedPort() as reserved, contextlib.ExitStack() as stack:
            listener = listen(EVERYWHERE if several else HERE)
            channel_port = listener.getsockname()[1]
            share = self._share(nonce, channel_port, reserved.port)
            hub = Hub(
                self._machine.loop.selector,
                listener,
                nonce=nonce,
                attempt=self._number,
                world_size=share.world_size,
                limits=self._limits,
            )
            stack.callback(hub.close)
            if self._gathering is not None:
                self._gathering.start(share, channel_port, hub)
            attempt = self._machine.attempt(share, hub, self._folder)
            status = self._conclude(attempt, hub, share)
            if self._gathering is not None:
                hub.finish("" if status is None else self._last_word(status), status or 0)
                self._tidy(hub, self._gathering, status)
        return status

    def _tidy(self, hub: Hub, gathering: NodeAssembly, status: int | None) -> None:
        """Let the other machines hear that the attempt is over, and after the last one, that the run is."""
        until = time.monotonic() + TIDY
        while hub.backlog and time.monotonic() < until:
            self._machine.turn(until)
        if status is not None:
            gathering.over(status, self._last_word(status), until=until)

    def _share(self, nonce: str, channel_port: int, master_port: int) -> Share:
        launch = self._machine.launch
        nodes = launch.nodes
        first = self._number if not self._failed else self._failed[0].number
        return Share(
            run_id=self._name,
            attempt=self._number,
            nonce=nonce,
            channel=join_address(HERE, channel_port),
            master_addr=nodes.host if nodes is not None else "127.0.0.1",
            master_port=master_port,
            workers=launch.workers,
            first_rank=0,
            world_size=self._gathering.world_size() if self._gathering is not None else launch.workers,
            node_rank=0,
            nodes=nodes.count if nodes is not None else 1,
            max_restarts=first + self._settings.max_restarts,
            folder=self._folder.path if self._folder is not None else None,
        )

    def _conclude(self, attempt: Attempt, hub: Hub, share: Share) -> int | None:
        case = hub.case() or attempt.case
        if attempt.stopped_by is not None:
            if case is not None and case.cause.kind is Kind.ERROR and "KeyboardInterrupt" not in case.cause.what:
                self._report(case, attempt, hub)
            return self._stopped(attempt, case)
        if case is None:
            return self._went_well(attempt, hub)
        self._failed.append(FailedAttempt(self._number, _progress(hub, share.world_size), _in_short(case)))
        self._last_status = case.exit_code or PEER_LOST
        decision = decide(self._failed, max_restarts=self._settings.max_restarts, stop_after=self._settings.stop_after)
        if decision.again and not self._machine.stopped():
            self._machine.say(f"attempt {self._number} failed: {self._failed[-1].summary}; {decision.reason}")
            self._write(case, attempt, hub)
            return None
        self._report(case, attempt, hub)
        if self._settings.max_restarts:
            for each in self._failed[:-1]:
                self._machine.say(f"attempt {each.number} had failed before: {each.summary}")
            number = self._machine.stopped_by
            reason = f"stopped by {number.name}" if decision.again and number is not None else decision.reason
            self._machine.say(f"not begun again: {reason}")
        return self._last_status

    def _went_well(self, attempt: Attempt, hub: Hub) -> int:
        preempted = [rank for rank, end in hub.ends().items() if end.returncode == PREEMPTED]
        if preempted:
            self._machine.say(f"run {self._name} made room (exit code {PREEMPTED}); start it again to go on")
            return PREEMPTED
        if self._failed:
            restarts = len(self._failed)
            self._machine.say(f"run {self._name} succeeded after {restarts} restart{'s' if restarts > 1 else ''}")
        return 0

    def _stopped(self, attempt: Attempt | None = None, case: Diagnosis | None = None) -> int:
        number = attempt.stopped_by if attempt is not None else self._machine.stopped_by
        assert number is not None
        killed = attempt.killed() if attempt is not None else ()
        named = f"rank{'s' if len(killed) > 1 else ''} {', '.join(map(str, killed))}"
        self._machine.say(f"stopped by {number.name}" + (f"; {named} had to be killed" if killed else ""))
        made_room = attempt is not None and any(end.returncode == PREEMPTED for end in attempt.ends.values())
        if made_room and case is None:
            return PREEMPTED
        return 128 + number

    def _report(self, case: Diagnosis, attempt: Attempt, hub: Hub) -> None:
        text = failure_text(case, name=self._name, tails=_tails(attempt, hub), logs=self._logs(attempt))
        self._machine.say(text.rstrip("\n"))
        self._write(case, attempt, hub)

    def _write(self, case: Diagnosis, attempt: Attempt, hub: Hub) -> None:
        if self._folder is None:
            return
        content = failure_json(case, name=self._name, tails=_tails(attempt, hub), logs=self._logs(attempt))
        try:
            write_report(self._folder.failure, content)
        except OSError as error:
            self._machine.say(f"warning: {self._folder.failure} cannot be written: {error.strerror}")

    def _logs(self, attempt: Attempt) -> dict[int, Path]:
        return {rank: self._folder.log(rank) for rank in attempt.ends} if self._folder is not None else {}

    def _last_word(self, status: int) -> str:
        if status == 0:
            return f"run {self._name} ended on all nodes"
        if status == PREEMPTED:
            return f"run {self._name} made room (exit code {PREEMPTED}) on all nodes"
        why = f": {self._failed[-1].summary}" if self._failed else ""
        return f"run {self._name} ended with exit code {status}{why}; node 0 has the report"


def _gathering(machine: Machine) -> NodeAssembly:
    from allstep.launch.join_server import NodeAssembly

    return NodeAssembly(machine)


def _progress(hub: Hub, world_size: int) -> Progress:
    return hub.progress() if any(hub.status(rank) is not None for rank in range(world_size)) else None


def _tails(attempt: Attempt, hub: Hub) -> dict[int, str]:
    elsewhere = {rank: end.stderr for rank, end in hub.ends().items()}
    return elsewhere | {rank: attempt.streams.last_output(rank) for rank in attempt.ends}


def _in_short(case: Diagnosis) -> str:
    cause = case.cause
    place = f", epoch {cause.epoch}, iteration {cause.iteration}" if cause.epoch else ""
    what = cause.what.strip().splitlines()[0] if cause.what.strip() else cause.kind.value
    said = (cause.traceback or cause.output).strip().splitlines()[-1:]
    words = f" ({without_torchs_prefix(said[0].strip())[:200]})" if said and cause.kind is Kind.EXIT else ""
    return f"rank {cause.rank}: {what[:200]}{words}{place}"


Progress = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that failed: its number, how far it came, and its first cause in a few words."""

    number: int
    progress: Progress
    summary: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to begin another attempt, and why."""

    again: bool
    reason: str


def decide(failed: Sequence[FailedAttempt], *, max_restarts: int, stop_after: int) -> Decision:
    """Decide after a failure.

    Args:
        failed: this run's attempts in order, all failed; at least one.
        max_restarts: restarts that the run may take.
        stop_after: restarts in a row without progress after which it ends all the same.
    """
    restarts = len(failed) - 1
    if restarts >= max_restarts:
        return Decision(False, f"{_times(restarts)} taken" if restarts else "no restarts were asked for")
    stalled = _stalled(failed)
    if stalled >= stop_after:
        return Decision(False, f"{_times(stalled)} in a row {_where(_furthest(failed))}")
    return Decision(True, f"restart {restarts + 1} of at most {max_restarts}")


def _stalled(failed: Sequence[FailedAttempt]) -> int:
    """Restarts since an attempt last came further than all before it."""
    furthest: Progress = None
    stalled = -1  # the first attempt is no restart
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
