"""What torch's flight recorder says of this rank's last collectives, where it was turned on.

Backends differ in what they record: nccl notes when a collective has started and completed, gloo only that it was
called. So what is not completed is shown as recorded, newest last, and the numbers of ranks can be compared.

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
_SHOWN = 3


def active_collectives() -> str:
    """One line for each of the last collectives that are not on record as completed; empty without a record."""
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
    """The last collectives of a dump in JSON that are not completed; if all are, the last one."""
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
