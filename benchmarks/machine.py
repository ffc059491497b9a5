"""What a figure was measured on, in one line: processor, cores, Python, torch. No host name, no path."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_line() -> str:
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    devices = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cpu}, {cores} cores{devices}, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
