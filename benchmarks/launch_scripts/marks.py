"""What the scripts of `benchmarks/launch.py` share: marks with a time, and the faults that BENCH_FAULT names."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

FAULT_AT = 5
STRUCK = {"both": (1, 2)}
FAULT = os.environ.get("BENCH_FAULT", "none")
STEPS = 2 if FAULT == "none" else 20 if FAULT == "restarts" else 100_000


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def mark(what: str) -> None:
    """Write the time and this process's pid where the benchmark finds them, the first time only."""
    path = Path(os.environ["BENCH_MARKS"]) / f"{what}_{rank()}"
    if not path.exists():
        path.write_text(f"{time.time()} {os.getpid()}")


def strike(step: int) -> bool:
    """Do what is to happen at this step; true where the rank is to leave its loop without a word."""
    if step != FAULT_AT or FAULT == "none" or rank() not in STRUCK.get(FAULT, (1,)):
        return False
    if FAULT == "restarts" and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) >= 3:
        return False
    mark("fault")
    if FAULT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "leave":
        return True
    raise ValueError(f"bad batch on rank {rank()}")


def clean_up() -> None:
    """What a careful script does in a `finally`, and what loses the true error elsewhere: it takes its time."""
    if FAULT == "cleanup":
        time.sleep(3)
