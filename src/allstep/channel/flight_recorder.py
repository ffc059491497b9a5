"""What torch's flight recorder says of this rank's unfinished collectives, where it was turned on.

Never imports torch: a process that has not imported it has no collectives.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_PATIENCE_S = 0.5
_SHOWN = 8


def active_collectives() -> str:
    """One line for each collective that has not completed, newest last; empty where nothing is recorded."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    if dump is None or not any(os.environ.get(name, "0") not in ("", "0") for name in _VARIABLES):
        return ""
    found: list[str] = []

    def read() -> None:
        found.append(summary(dump(True, False)))

    thread = threading.Thread(target=read, daemon=True, name="allstep flight recorder")
    thread.start()
    thread.join(_PATIENCE_S)
    return found[0] if found else ""


def summary(dumped: bytes | str) -> str:
    """The unfinished collectives of a dump in JSON; if all are finished, the last one."""
    try:
        entries: list[dict[str, Any]] = json.loads(dumped).get("entries", [])
        unfinished = [entry for entry in entries if entry.get("state") != "completed"]
        return "\n".join(_line(entry) for entry in (unfinished or entries[-1:])[-_SHOWN:])
    except (ValueError, AttributeError, TypeError):
        return ""


def _line(entry: dict[str, Any]) -> str:
    group = entry.get("process_group")
    named = f" of group {group[-1]}" if isinstance(group, list) and group else ""
    sizes = f", sizes {entry['input_sizes']}" if entry.get("input_sizes") else ""
    number = entry.get("collective_seq_id", "?")
    return f"{entry.get('profiling_name', 'a collective')} #{number}{named}: {entry.get('state', 'unknown')}{sizes}"
