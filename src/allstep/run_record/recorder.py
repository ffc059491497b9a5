"""What is written into a run's record, by the one process that watches over all of its ranks.

`RunRecorder` is made when the run's folder is known, and lives as long as its process does. It writes `run.json` where
there is none yet: what the run is. Then events, of these kinds:

| kind | when | fields |
|---|---|---|
| `attempt` | all workers are started | `attempt`, `world`, `nodes`, `launcher`, `process`, `job` |
| `arrived` | all ranks have come through `init` | `attempt`, `hosts` |
| `progress` | at most once in 5 s | `attempt`, and those of `Progress`, with `rate` in iterations a second |
| `save` | a checkpoint was committed | `attempt`, `step`, `seconds`, `address` |
| `signal` | the launcher was told to stop, or to pass a signal on | `attempt`, `signal` |
| `failure` | an attempt failed | `attempt`, and those of `FailureSummary` |
| `attempt_end` | no worker is left | `attempt`, `outcome`, `code` |
| `end` | no further attempt follows in this launch | `outcome`, `code`, and `why` where no attempt says it |
| `requeue` | a job's own process put it back into the queue, or not | `job`, `code`, `what` |

`process` is who to send a signal to stop; `job` SLURM's number, with `_` and its own number for an array's member.

A record is worth no run: where it cannot be written, one warning says so, and the run goes on. Secrets are left out of
every text.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from allstep.protocol.masking import mask_all, masked_arguments
from allstep.protocol.messages import CheckpointSaved
from allstep.protocol.private_files import write_private_json
from allstep.run_record.event_log import EventLog
from allstep.run_record.progress import Progress
from allstep.version import __version__

FILE = "run.json"
VERSION = 1

Outcome = Literal["finished", "failed", "preempted", "stopped"]
"""How an attempt, or a launch, ended: preempted means that it saved and is to be started again."""


@dataclass(frozen=True, slots=True)
class FailureSummary:
    """The first cause of a failure, in a few words.

    Attributes:
        rank: which rank failed first.
        what: what happened to it, in one line.
        host: where it ran; empty where that is not known.
        epoch: where it was, and `iteration`; 0 where it was not training.
        iteration: see `epoch`.
        report: the file with the whole report; empty where there is none.
    """

    rank: int
    what: str
    host: str = ""
    epoch: int = 0
    iteration: int = 0
    report: str = ""


def about_run(
    *, name: str, run_id: str, launcher: str, command: Sequence[str], process: Mapping[str, Any], job: str
) -> dict[str, Any]:
    """What `run.json` says of a run that this process, or one that it watches over, is about to begin.

    Args:
        name: of the run and its folder.
        run_id: what its launcher calls it, the same at every restart.
        launcher: as `Placement.launcher` has it.
        command: the script or module, and its arguments.
        process: who to send a signal to.
        job: SLURM's number, or empty.
    """
    workdir = ""
    with contextlib.suppress(OSError):  # it may have been removed
        workdir = os.getcwd()
    return {
        "run": name,
        "id": run_id,
        "launcher": launcher,
        "command": masked_arguments(command),
        "workdir": workdir,
        "host": socket.gethostname(),
        "python": sys.version.partition(" ")[0],
        "allstep": __version__,
        "process": dict(process),
        "job": job,
    }


class RunRecorder:
    """Writes the record of one run.

    Args:
        folder: the run's, which is there.
        about: what `run.json` says of the run, where it is not there yet.
        secrets: what is left out of all texts.
        warn: called with one line when the record cannot be written.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        *,
        secrets: Collection[str] = (),
        warn: Callable[[str], object],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self._secrets = secrets
        self._warn = warn
        self._has_warned = False
        self._attempt = 0
        self._log: EventLog | None = None
        try:
            if not (folder / FILE).exists():
                said = mask_all({"version": VERSION, **about, "created": round(clock(), 3)}, secrets)
                write_private_json(folder / FILE, said)
            self._log = EventLog(folder, clock=clock)
        except OSError as error:
            self._give_up(error)

    def attempt_began(
        self, attempt: int, *, world: int, nodes: int, launcher: str, process: Mapping[str, Any], job: str
    ) -> None:
        """All workers of an attempt are being started."""
        self._attempt = attempt
        self._add("attempt", world=world, nodes=nodes, launcher=launcher, process=dict(process), job=job)

    def arrived(self, hosts: Collection[str]) -> None:
        """All ranks have come, on these machines."""
        self._add("arrived", hosts=list(hosts))

    def progress(self, progress: Progress, rate: float | None) -> None:
        """How far the ranks are."""
        self._add("progress", **asdict(progress), rate=None if rate is None else round(rate, 4))

    def saved(self, saved: CheckpointSaved) -> None:
        """A checkpoint was committed."""
        self._add("save", step=saved.step, seconds=saved.seconds, address=saved.address)

    def signalled(self, name: str) -> None:
        """A signal came, to stop or to pass on."""
        self._add("signal", signal=name)

    def failed(self, failure: FailureSummary) -> None:
        """The attempt has failed."""
        self._add("failure", **asdict(failure))

    def attempt_ended(self, outcome: Outcome, code: int) -> None:
        """No worker of the attempt is left."""
        self._add("attempt_end", outcome=outcome, code=code)

    def ended(self, outcome: Outcome, code: int, why: str = "") -> None:
        """No further attempt follows."""
        self._add("end", outcome=outcome, code=code, **({"why": why} if why else {}))

    def _add(self, kind: str, **fields: Any) -> None:
        if self._log is None:
            return
        try:
            self._log.add(kind, **mask_all({"attempt": self._attempt, **fields}, self._secrets))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(
                f"warning: the run's record cannot be written to {self.folder}: {error.strerror or error}; "
                "`allstep status` will not know how far it is"
            )


def note_requeue(folder: Path, job: str, code: int, what: str) -> None:
    """Add what became of a job to the record in its run's folder; raises OSError.

    Args:
        folder: the run's.
        job: the number under which it goes on, or ended.
        code: the job's exit code.
        what: the same in words.
    """
    EventLog(folder).add("requeue", job=job, code=code, what=what)
