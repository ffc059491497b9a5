"""Ports that all ranks of a job can name without having spoken, for launchers that hand out none.

The candidates are a function of the job's name alone. They stay out of the kernel's ephemeral ports (32768-60999), of
SLURM's own (6817-6818), of torchrun's defaults (29400, 29500) and of what Kubernetes gives to services (30000-32767).
Two jobs on one node may still derive the same one, or a service may sit on it, so there are several, tried in order.
"""

from __future__ import annotations

import hashlib

FIRST_PORT, END_PORT = 20000, 29000
CANDIDATES = 8


def derive_ports(job: str) -> tuple[int, ...]:
    """`CANDIDATES` different ports in [FIRST_PORT, END_PORT) for the job of this name, the same on every rank."""
    ports: dict[int, None] = {}
    trial = 0
    while len(ports) < CANDIDATES:
        digest = hashlib.sha256(f"{job}/{trial}".encode()).digest()
        ports[FIRST_PORT + int.from_bytes(digest[:8], "big") % (END_PORT - FIRST_PORT)] = None
        trial += 1
    return tuple(ports)
