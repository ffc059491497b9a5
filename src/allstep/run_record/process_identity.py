"""Which process something is about, so that its number alone is not taken for it: it may be another's by now.

Contract: `identity_of` says who a process of this machine is, as values for JSON. `is_alive` answers for such values,
now or days later: True and False are certain, None means that it cannot be told from here, because the process is on
another machine or in another container.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ANSWER_S = 2.0


def identity_of(pid: int) -> dict[str, Any]:
    """Who a process of this machine is: its number, when it was started, and where the number holds."""
    return {"pid": pid, "started": _started(pid), **_here()}


def is_alive(identity: Mapping[str, Any]) -> bool | None:
    """Whether the process is there and is the one that was meant; None where that cannot be told from here."""
    pid, started = identity.get("pid"), identity.get("started")
    here = _here()
    if not isinstance(pid, int) or not started or any(identity.get(name) != value for name, value in here.items()):
        return None
    return bool(_started(pid) == started)


def _here() -> dict[str, str]:
    """Where numbers of processes hold: a machine, since it was last started, and a container on it."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _started(pid: int) -> str:
    """When a process was started, as its system tells it; empty where there is none, or only its remains."""
    try:
        # The second field is the program's name, in which anything can be. What follows begins with the third.
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    except (OSError, IndexError):
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # a system without /proc
        command = ["ps", "-o", "lstart=", "-p", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
        return done.stdout.strip()
    return ""
