"""torch's flight recorders: what they hold of this rank's last collectives, where the user turned them on.

They have no public interface in Python. Two functions of `torch._C._distributed_c10d` read them:
`_dump_nccl_trace_json` NCCL's own (torch 2.5, builds with NCCL), `_dump_fr_trace_json` that of the other backends
(torch 2.8). They are looked for at each use, and only in a module that is loaded already: a process that has not
imported torch has no collectives. Where both are gone, one warning says that the stacks of a hang come without
collectives, and everything else goes on.

Backends differ in what they record. NCCL notes when a collective has started and completed, gloo only that it was
called. So what is not completed is shown as recorded, newest last, and the numbers of ranks can be compared.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import warnings
from typing import Any

_MODULE = "torch._C._distributed_c10d"
_FUNCTIONS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_PATIENCE_S = 0.5  # the recorder has a lock of its own, which a rank that hangs may hold
_SHOWN = 3


def active_collectives() -> str:
    """One line for each of the last collectives that are not on record as completed; empty without a record."""
    c10d = sys.modules.get(_MODULE)
    if c10d is None or not any(os.environ.get(name, "0") not in ("", "0") for name in _VARIABLES):
        return ""
    dumps = [dump for name in _FUNCTIONS if (dump := getattr(c10d, name, None)) is not None]
    if not dumps:
        warn_once()
        return ""
    found: list[str] = []

    def read() -> None:
        with contextlib.suppress(Exception):  # it is another's format and another's function
            found.extend(filter(None, (summary(dump(True, False)) for dump in dumps)))

    thread = threading.Thread(target=read, daemon=True, name="allstep flight recorder")
    thread.start()
    thread.join(_PATIENCE_S)
    return "\n".join(found)


@functools.cache
def warn_once() -> None:
    """Say once in a process that the flight recorders cannot be read."""
    # This runs in the thread that sends heartbeats, which has to go on where warnings are turned into errors.
    with contextlib.suppress(RuntimeWarning):
        warnings.warn(
            f"this version of torch has none of {', '.join(_FUNCTIONS)} in {_MODULE}, so the report of a hang names no "
            "collectives",
            RuntimeWarning,
            stacklevel=3,
        )


def summary(dumped: bytes | str) -> str:
    """The last collectives of a dump in JSON that are not completed; if all are, the last one."""
    try:
        entries: list[dict[str, Any]] = json.loads(dumped).get("entries", [])
        unfinished = [entry for entry in entries if entry.get("state") != "completed"]
        return "\n".join(_line(entry) for entry in (unfinished or entries[-1:])[-_SHOWN:])
    except (ValueError, AttributeError, TypeError):  # the format is torch's own, and may change
        return ""


def _line(entry: dict[str, Any]) -> str:
    group = entry.get("process_group")
    named = f" of group {group[-1]}" if isinstance(group, list) and group else ""
    sizes = f", sizes {entry['input_sizes']}" if entry.get("input_sizes") else ""
    number = entry.get("collective_seq_id", "?")
    return f"{entry.get('profiling_name', 'a collective')} #{number}{named}: {entry.get('state', 'unknown')}{sizes}"
