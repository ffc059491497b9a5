"""Where a run is and how it is: its record, what SLURM says of its job, and whether its launcher lives, put together.

Contract: `statuses` asks SLURM once about all runs that may have a job, for a bounded time, and gives a `RunStatus` for
each run, and for each member of an array that waits. It raises nothing: what does not answer is part of the answer
(`why`). `judge_state` decides, purely.

The states:

| state | meaning |
| --- | --- |
| queued | its job waits, for its first start or to go on |
| starting | its job has begun, and its workers have not |
| running | |
| stopping | it was told to stop, and its ranks have not left yet |
| finished, failed | its last launch ended so |
| preempted | it saved and stopped, and nothing is known to start it again |
| stopped | a signal stopped it, or it was cancelled, and nothing starts it again |
| cancelled, timed out, node failed, out of memory | SLURM ended the job so, and the run could say no more |
| killed | its launcher's process is gone and did not say how it ended |
| silent | its launcher is on another machine, and has not been heard of |
| unknown | SLURM does not answer, and there is no record yet |
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allstep.duration_words import took_in_words
from allstep.exit_codes import NEVER_AGAIN, PREEMPTED
from allstep.run_control.run_search import FoundRun
from allstep.run_record.event_log import Event
from allstep.run_record.process_identity import is_alive
from allstep.run_record.run_history import AttemptHistory, RunHistory
from allstep.submission.job_states import ANSWER_S, JobState, JobStates, ask_jobs

FRESH_S = 150.0
"""Seconds after its last event in which a run is taken to go on; its record is added to at least once a minute."""

OVER = frozenset(
    {
        *("finished", "failed", "preempted", "stopped", "cancelled", "timed out", "node failed", "out of memory"),
        *("killed", "silent"),
    }
)
"""States in which nothing more comes of a run by itself."""

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_ACTIVE = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_ENDED_BY_SLURM = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "timed out",
    "DEADLINE": "timed out",
    "NODE_FAIL": "node failed",
    "BOOT_FAIL": "node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "COMPLETED": "finished",
}
_STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1")


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """The last checkpoint: after which iteration, where, when (seconds since 1970), and how many seconds it took."""

    step: int
    address: str
    time: float
    seconds: float


@dataclass(frozen=True, slots=True)
class LastFailure:
    """The first cause of the last failure: attempt, time, rank, what happened, and the file with the whole report."""

    attempt: int
    time: float
    rank: int
    what: str
    report: str


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where a run is. What is not known is None, or empty.

    Attributes:
        run: its name.
        folder: where its record and logs are.
        state: see above.
        why: what else there is to say of the state.
        launcher: what started it: "allstep", "torchrun", "slurm" and so on.
        job: SLURM's number.
        nodes: where it runs, or ran last, as SLURM writes it or separated by commas.
        attempt: the number of the last attempt.
        attempts: how many there were.
        requeues: how often its job was put back into the queue by itself.
        world: ranks.
        epoch: of the rank that is furthest.
        iteration: of the same.
        goal: iterations that it is to have.
        rate: iterations a second; None where it does not run.
        left: seconds to the goal at that rate.
        limit: seconds to the end of the job's time.
        began: of the last attempt, in seconds since 1970.
        took: seconds of that attempt, until now where it goes on.
        checkpoint: the last one.
        failure: the last one.
        heard: when its record was last added to, in seconds since 1970.
    """

    run: str
    folder: str
    state: str
    why: str = ""
    launcher: str = ""
    job: str = ""
    nodes: str = ""
    attempt: int | None = None
    attempts: int = 0
    requeues: int = 0
    world: int = 0
    epoch: int | None = None
    iteration: int | None = None
    goal: int | None = None
    rate: float | None = None
    left: float | None = None
    limit: float | None = None
    began: float | None = None
    took: float | None = None
    checkpoint: SavedCheckpoint | None = None
    failure: LastFailure | None = None
    heard: float | None = None


def statuses(runs: Sequence[FoundRun], *, within: float = ANSWER_S) -> list[RunStatus]:
    """How these runs are now; `within` seconds are given to each of SLURM's commands."""
    jobs = ask_jobs([job for run in runs if (job := run.array or _job_to_ask(run))], within)
    now = time.time()
    found = []
    for run in runs:
        if not run.array:
            found.append(status_of(run, jobs, now))
            continue
        begun = {each.job for each in runs}
        members = [member for member in jobs.members(run.array) if member.job not in begun]
        found += [_waiting_member(run, member) for member in members]
        if jobs.problem:
            found.append(RunStatus(run.name, str(run.folder), "unknown", jobs.problem, job=run.array))
    return found


def status_of(run: FoundRun, jobs: JobStates, now: float) -> RunStatus:
    """How a run is, by what SLURM said of its job; `now` in seconds since 1970."""
    history, job = run.history, jobs.jobs.get(run.job)
    last = history.last or AttemptHistory(0, 0.0)
    asked = bool(run.job) and not jobs.problem and bool(_job_to_ask(run))
    alive = is_alive(last.process) if last.process and not history.end else None
    state, why = judge_state(history, job, is_known=job is not None or not asked, alive=alive, now=now)
    if jobs.problem and run.job and _job_to_ask(run):
        why = "; ".join(filter(None, (why, jobs.problem)))
    is_on = state in ("running", "stopping")
    progress = last.progress
    rate = progress.get("rate") if is_on else None
    goal, iteration = progress.get("goal") or None, progress.get("iteration")
    left = None
    if rate and goal and iteration is not None and progress.get("section") != "idle":
        left = max(0.0, (goal - iteration) / rate)
    has_place = job is not None and job.state in _ACTIVE
    return RunStatus(
        run=run.name,
        folder=str(run.folder),
        state=state,
        why=why,
        launcher=str(history.about.get("launcher", "")),
        job=run.job,
        nodes=job.nodes if has_place and job is not None and job.nodes else ",".join(last.hosts),
        attempt=last.attempt if history.attempts else None,
        attempts=len(history.attempts),
        requeues=sum(event.get("code") == PREEMPTED for event in history.requeues),
        world=last.world,
        epoch=progress.get("epoch"),
        iteration=iteration,
        goal=goal,
        rate=rate,
        left=left,
        limit=max(0.0, job.ends - now) if has_place and job is not None and job.ends is not None else None,
        began=last.began or None,
        took=_took(last, history, now, is_on=is_on),
        checkpoint=_checkpoint(history.last_save),
        failure=_failure(history.last_failure),
        heard=history.heard or None,
    )


def judge_state(
    history: RunHistory, job: JobState | None, *, is_known: bool, alive: bool | None, now: float
) -> tuple[str, str]:
    """A run's state, and what else there is to say of it.

    Args:
        history: of its record.
        job: what SLURM says of its job; None where it says nothing, or the run has none.
        is_known: False where SLURM answered and does not know the job any more.
        alive: whether its launcher's process lives; None where that cannot be told from here.
        now: seconds since 1970.
    """
    last, end = history.last, history.end
    said = str(end.get("outcome") or ""), str(end.get("why") or "")
    if job is not None and job.state in _WAITING:
        return "queued", job.reason
    if job is not None and job.state in _ACTIVE:
        if last is None or end or last.job != job.job:
            return ("stopping", said[0]) if end and last is not None and last.job == job.job else ("starting", "")
        return _going_on(last, job.state)
    if said[0]:
        outcome = "stopped" if said[0] == "preempted" and _is_final(history) else said[0]
        return outcome, said[1] or _how(history)
    if job is not None:
        return _ENDED_BY_SLURM.get(job.state, "failed"), f"SLURM calls job {job.job} {job.state}"
    if not is_known:
        return "killed", "SLURM does not know its job any more, and it did not say how it ended"
    if last is None:
        return "unknown", "it has not begun" if history.heard == 0 else ""
    if alive is True:
        return _going_on(last, "")
    if alive is False:
        return "killed", "its launcher is gone and did not say how it ended"
    silent_for = now - history.heard
    if silent_for < FRESH_S:
        return _going_on(last, "")
    host = last.process.get("host", "another machine")
    return "silent", f"its launcher was on {host}, and was last heard of {took_in_words(silent_for)} ago"


def _going_on(last: AttemptHistory, slurms: str) -> tuple[str, str]:
    if last.signal in _STOPS:
        return "stopping", last.signal
    if last.outcome == "failed":
        return "starting", "another attempt follows the one that failed"
    return "running", "SLURM has suspended its job" if slurms in ("SUSPENDED", "STOPPED") else ""


def _how(history: RunHistory) -> str:
    """What there is to say of an end beside the outcome."""
    if requeue := _last_requeue(history):
        return str(requeue.get("what", ""))
    code = history.end.get("code")
    return f"exit code {code}" if code else ""


def _last_requeue(history: RunHistory) -> Event:
    """What became of the job after the last attempt; empty where nothing was said."""
    last, attempt = (history.requeues or [{}])[-1], history.last
    return last if last and (attempt is None or last["time"] >= attempt.began) else {}


def _is_final(history: RunHistory) -> bool:
    """Whether the job said at its end that it is not put back into the queue."""
    return bool(_last_requeue(history).get("code") == NEVER_AGAIN)


def _job_to_ask(run: FoundRun) -> str:
    """The job of a run that SLURM may have something to say of: not of one that has ended for good."""
    history = run.history
    if history.end.get("outcome") in ("finished", "failed", "stopped") or _is_final(history):
        return ""
    return run.job


def _waiting_member(array: FoundRun, member: JobState) -> RunStatus:
    state, why = judge_state(RunHistory(), member, is_known=True, alive=None, now=0.0)
    name = f"{array.name}-{member.job.partition('_')[2]}"
    return RunStatus(name, str(array.folder.parent / name), state, why, job=member.job, nodes=member.nodes)


def _took(last: AttemptHistory, history: RunHistory, now: float, *, is_on: bool) -> float | None:
    if not history.attempts:
        return None
    end = now if is_on else last.ended or history.heard
    return round(max(0.0, end - last.began), 3)


def _checkpoint(event: Mapping[str, Any]) -> SavedCheckpoint | None:
    if not event:
        return None
    return SavedCheckpoint(event.get("step", 0), event.get("address", ""), event["time"], event.get("seconds", 0.0))


def _failure(event: Mapping[str, Any]) -> LastFailure | None:
    if not event:
        return None
    return LastFailure(
        event.get("attempt", 0), event["time"], event.get("rank", 0), event.get("what", ""), event.get("report", "")
    )
