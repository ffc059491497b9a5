"""What a run's record says, put together: its attempts, how far each came, what it saved, how it ended. Pure.

`history_of` folds events, oldest first, and `read_history` reads them from a folder. Both take what is there: a log
that was cut, thinned out or not begun gives a history with less in it, and an event of an unknown kind is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allstep.exit_codes import PREEMPTED
from allstep.protocol.private_files import read_json
from allstep.run_record.event_log import Event, read_events
from allstep.run_record.recorder import FILE

STOPPED_FOR_NOW = {"outcome": "preempted", "code": PREEMPTED}


@dataclass(slots=True)
class AttemptHistory:
    """One start of all workers. Times are in seconds since 1970.

    Attributes:
        attempt: its number, as its folder has it.
        began: when.
        ended: when its end was noted; None while it was not.
        outcome: see `recorder.Outcome`; empty while it has none.
        code: its exit code.
        world: ranks.
        nodes: machines.
        hosts: their names, once all ranks had come.
        job: SLURM's number; empty outside SLURM.
        process: who to send a signal to; see `process_identity`.
        progress: the last event of that kind; empty before the first.
        saves: how many checkpoints were committed, as far as the log still tells.
        failure: the first cause; empty where it did not fail.
        signal: the last signal that came.
    """

    attempt: int
    began: float
    ended: float | None = None
    outcome: str = ""
    code: int = 0
    world: int = 0
    nodes: int = 0
    hosts: list[str] = field(default_factory=list)
    job: str = ""
    process: dict[str, Any] = field(default_factory=dict)
    progress: Event = field(default_factory=dict)
    saves: int = 0
    failure: Event = field(default_factory=dict)
    signal: str = ""


@dataclass(slots=True)
class RunHistory:
    """A run.

    Attributes:
        about: what `run.json` says.
        attempts: in order.
        last_save: the event of the last checkpoint; empty without one.
        last_failure: the event of the last failure; empty without one.
        requeues: events of that kind.
        end: the event of the last launch's end; empty while an attempt may be under way or to follow.
        heard: when the last event came; 0 where there is none.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    attempts: list[AttemptHistory] = field(default_factory=list)
    last_save: Event = field(default_factory=dict)
    last_failure: Event = field(default_factory=dict)
    requeues: list[Event] = field(default_factory=list)
    end: Event = field(default_factory=dict)
    heard: float = 0.0

    @property
    def last(self) -> AttemptHistory | None:
        """The last attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def job(self) -> str:
        """The SLURM job that has the run now; empty outside SLURM."""
        last = self.last
        if self.requeues and (last is None or self.requeues[-1]["time"] > last.began):
            return str(self.requeues[-1].get("job", ""))
        return last.job if last is not None else ""


def read_history(folder: Path) -> RunHistory:
    """The history of the run in a folder; an empty one where it has no record."""
    return history_of(read_json(folder / FILE), read_events(folder))


def history_of(about: Mapping[str, Any], events: Iterable[Event]) -> RunHistory:
    """The history that these events make."""
    history = RunHistory(about)
    for event in events:
        history.heard = max(history.heard, event["time"])
        _take(history, event)
    return history


def _take(history: RunHistory, event: Event) -> None:
    match event["kind"]:
        case "attempt":
            history.end = {}
            history.attempts.append(_attempt(event))
            return
        case "requeue":
            history.requeues.append(event)
            # Where SLURM ended the writer with its ranks, the job's own process is the one that tells.
            if not history.end:
                history.end = {"n": event["n"], "time": event["time"], "kind": "end", **STOPPED_FOR_NOW}
        case "end" if history.last is None or event.get("attempt") == history.last.attempt:
            history.end = event
        case "save":
            history.last_save = event
        case "failure":
            history.last_failure = event
    # A writer may be done with its attempt when the next one has begun.
    attempt = next((each for each in reversed(history.attempts) if each.attempt == event.get("attempt")), None)
    if attempt is None:
        return
    match event["kind"]:
        case "arrived":
            attempt.hosts = [str(host) for host in event.get("hosts", ())]
        case "progress":
            attempt.progress = event
        case "save":
            attempt.saves += 1
        case "signal":
            attempt.signal = str(event.get("signal", ""))
        case "failure":
            attempt.failure = event
        case "attempt_end":
            attempt.ended, attempt.outcome = event["time"], str(event.get("outcome", ""))
            attempt.code = _count(event, "code")


def _attempt(event: Event) -> AttemptHistory:
    process = event.get("process")
    return AttemptHistory(
        attempt=_count(event, "attempt"),
        began=event["time"],
        world=_count(event, "world"),
        nodes=_count(event, "nodes"),
        job=str(event.get("job") or ""),
        process=process if isinstance(process, dict) else {},
    )


def _count(event: Event, name: str) -> int:
    value = event.get(name)
    return value if isinstance(value, int) else 0
