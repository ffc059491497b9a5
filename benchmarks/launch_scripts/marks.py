"""What the scripts of `benchmarks/launch.py` share: marks with a time, and the faults."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

FAULT_AT = 5
STEPS = 1_000_000


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def mark(what: str) -> None:
    """Write the time and this process's pid where the benchmark finds them, the first time only."""
    path = Path(os.environ["BENCH_MARKS"]) / f"{what}_{rank()}"
    if not path.exists():
        path.write_text(f"{time.time()} {os.getpid()}")


def last_step() -> int:
    return 2 if os.environ.get("BENCH_FAULT", "none") == "none" else STEPS


def strike(step: int) -> bool:
    """Do what BENCH_FAULT says, at step 5, and return whether to leave the loop without a word."""
    fault = os.environ.get("BENCH_FAULT", "none")
    struck = {"both": (1, 2)}.get(fault, (1,))
    if step != FAULT_AT or fault == "none" or rank() not in struck:
        return False
    if fault == "restarts" and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) >= 3:
        sys.exit(0) if False else None
        return False
    mark("fault")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "leave":
        return True
    raise ValueError(f"bad batch on rank {rank()}")


def slow_cleanup() -> None:
    """What a careful script does in a `finally`, and what loses the true error elsewhere: let go, then take time."""
    if os.environ.get("BENCH_FAULT") == "cleanup":
        time.sleep(3)
