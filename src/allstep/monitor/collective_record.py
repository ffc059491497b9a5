"""This rank's last collectives, for the report of a hang and for torch's own analyser.

Contract: a rank that is asked for its stacks calls `record_collectives` once. It reads torch's flight recorders in a
thread of its own, since a recorder has a lock, which a rank that hangs may hold. That thread also writes the whole
record into the attempt's folder, where the rank has one, as `flight_recorder_rank_R`. Both are waited for for a bounded
time, shorter than the monitor waits for the answer; once it has all answers, it may order the rank to leave at once.
NCCL is told the same name by the launcher, and writes there itself where its own limit ends the process. So
`torchfrtrace FOLDER --prefix flight_recorder_rank_` finds the files of all ranks. Nothing raises.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path

from allstep.diagnosis.flight_records import read_dump, summary, to_text
from allstep.monitor.torch_private import dump_for_the_analyser, dumps_as_json
from allstep.protocol.private_files import open_private

PREFIX = "flight_recorder_rank_"
"""What the files of an attempt begin with; the rank follows."""

_PATIENCE_S = 0.5
_WRITE_S = 1.0


@dataclass(slots=True)
class RecordedCollectives:
    """`trace` is a line for each of the last collectives that are not over, `groups` what ranks are compared by."""

    trace: str = ""
    groups: str = ""


def record_collectives(rank: int, folder: str) -> RecordedCollectives:
    """What this process has on record; empty without a record.

    Args:
        rank: whose record it is.
        folder: where the file goes; empty: nowhere.
    """
    recorded = RecordedCollectives()

    def read() -> None:
        dumps = dumps_as_json()
        recorded.trace = "\n".join(filter(None, map(summary, dumps)))
        recorded.groups = to_text([record for dump in dumps for record in read_dump(dump)])
        is_read.set()
        with contextlib.suppress(Exception):  # a folder that is gone, a full disk, another's function
            if folder and recorded.groups and (dump := dump_for_the_analyser()):
                _write(Path(folder) / f"{PREFIX}{rank}", dump)

    is_read = threading.Event()
    thread = threading.Thread(target=read, daemon=True, name="allstep flight recorder")
    thread.start()
    if is_read.wait(_PATIENCE_S):
        thread.join(_WRITE_S)
    return RecordedCollectives(recorded.trace, recorded.groups)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb", opener=open_private) as file:
        file.write(content)
