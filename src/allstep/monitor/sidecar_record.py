"""The record of a run without a supervisor, kept by the sidecar of rank 0.

Contract: `open_record` is called once the sidecar serves, so that no rank waits for it, and gives None where no record
is asked for or none can be kept. The sidecar then calls `tick` when `deadline` has passed, `look` when something has
happened, `saved` as checkpoints are committed, `failed` at a verdict, and `ended` when no rank needs it any more. The
first end counts, and is written as soon as it is known: a scheduler may end this process with the ranks.

How the ranks ended is known from what they said when they left, and of this node's also from their processes. A sidecar
that is killed with the ranks writes no end: a reader then goes by the processes, or by SLURM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from allstep.diagnosis.root_cause import Diagnosis
from allstep.exit_codes import CANCELLED, PREEMPTED
from allstep.monitor.hub import Hub
from allstep.monitor.run_watch import RunWatch, summary_of
from allstep.monitor.sidecar import SidecarSetup
from allstep.protocol.masking import mask_all
from allstep.protocol.messages import CheckpointSaved
from allstep.run_record.recorder import Outcome, RunRecorder
from allstep.run_record.run_folders import default_name, folder_of_ranks


class SidecarRecord:
    """The record of the ranks of one sidecar.

    Args:
        recorder: writes it.
        hub: of the ranks.
        setup: the sidecar's.
    """

    def __init__(self, recorder: RunRecorder, hub: Hub, setup: SidecarSetup) -> None:
        self._recorder = recorder
        self._hub = hub
        recorder.attempt_began(
            setup.attempt,
            world=setup.world_size,
            nodes=setup.nodes,
            launcher=setup.about["launcher"],
            process=setup.about["process"],
            job=setup.about["job"],
        )
        self._world_size = setup.world_size
        self._watch = RunWatch(recorder, hub, setup.world_size)
        self._has_failed = self._has_ended = False
        self.saved: Callable[[CheckpointSaved], None] = recorder.saved

    def deadline(self) -> float:
        """When `tick` is due."""
        return math.inf if self._has_ended else self._watch.deadline()

    def tick(self) -> None:
        """Look at the ranks, and write down what is due."""
        self._watch.tick()

    def look(self) -> None:
        """Something has happened: where all ranks have left in order, that is the end."""
        if not self._has_failed and self._hub.goodbyes >= self._world_size:
            self.ended()

    def failed(self, diagnosis: Diagnosis) -> None:
        """The ranks have failed; written at once, since a scheduler may end this process with them."""
        if not self._has_ended:
            self._has_failed = True
            self._watch.finish()
            self._recorder.failed(summary_of(diagnosis, None))
            self._end("failed", diagnosis.exit_code)

    def ended(self) -> None:
        """No rank needs the sidecar any more."""
        if not self._has_ended:
            self._watch.finish()
            self._end(*self._outcome())

    def _end(self, outcome: Outcome, code: int) -> None:
        self._has_ended = True
        self._recorder.attempt_ended(outcome, code)
        self._recorder.ended(outcome, code)

    def _outcome(self) -> tuple[Outcome, int]:
        codes = {*self._hub.leaving_codes().values(), *(end.returncode for end in self._hub.ends().values())}
        if PREEMPTED in codes:
            return "preempted", PREEMPTED
        return ("stopped", CANCELLED) if CANCELLED in codes else ("finished", 0)


def open_record(setup: SidecarSetup, hub: Hub, warn: Callable[[str], object]) -> SidecarRecord | None:
    """Begin the record that a sidecar is to keep; None where it is to keep none, or cannot.

    Args:
        setup: what the sidecar was told.
        hub: of the ranks.
        warn: called with a line where there can be no record.
    """
    if not setup.about.get("workdir"):
        return None
    about = mask_all({**setup.about}, setup.secrets)
    name = default_name(next(iter(about["command"]), ""), time.strftime("%Y%m%d-%H%M%S"))
    try:
        folder = folder_of_ranks(setup.run_folder, Path(about["workdir"]), name, about)
    except OSError as error:
        warn(f"warning: no record of the run is kept, for want of a folder in {about['workdir']}: {error}")
        return None
    if folder is None:
        return None
    recorder = RunRecorder(folder, {**about, "run": folder.name}, secrets=setup.secrets, warn=warn)
    return SidecarRecord(recorder, hub, setup)
