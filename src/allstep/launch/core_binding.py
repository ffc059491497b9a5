"""Which cores each worker runs on, where SLURM gave this machine's task cores of its own: an equal share, near its GPU.

Contract: the supervisor calls `granted_cores` and, with what that says, `bind_workers`, before anything is started.
Nothing here raises; what cannot be read is not known, and then cores are divided in their order.

Workers are bound where this process may run on exactly as many cores as SLURM granted to its task: then those are its
own (`--cpus-per-task` with SLURM's task/affinity or task/cgroup, or a whole node). Elsewhere SLURM does not keep jobs
to their cores, and nobody can say which of them are this job's: no worker is bound, and the number alone decides how
many threads there are. A person who binds threads by OpenMP's own variables (`OPENMP_BINDING`) is left to that.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from allstep.placement.slurm import SlurmStep

OPENMP_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables by which a person binds threads, or says not to."""

_ANSWER_S = 10.0
_BUS = re.compile(r"[0-9a-f]*([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])", re.I)


@dataclass(frozen=True, slots=True)
class CpuTopology:
    """Where the cores of a machine are.

    Args:
        numa: the NUMA node of each logical CPU.
        siblings: the first logical CPU of the core that each is of.
    """

    numa: Mapping[int, int] = field(default_factory=dict)
    siblings: Mapping[int, int] = field(default_factory=dict)


def granted_cores(environ: Mapping[str, str]) -> int | None:
    """How many logical CPUs SLURM granted to this task, the only one of its step on this node; None where it was not
    asked or this is no step."""
    if not SlurmStep().matches(environ):
        return None
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        count = environ.get(name, "")
        if count.isascii() and count.isdecimal() and int(count) > 0:
            return int(count)
    return None


def bind_workers(
    allowed: Sequence[int], granted: int, devices: Sequence[str], workers: int, environ: Mapping[str, str]
) -> tuple[tuple[int, ...], ...]:
    """The logical CPUs of each worker of this machine; empty where none is to be bound.

    Args:
        allowed: those that this process may use.
        granted: how many SLURM says that are its own.
        devices: the names of the workers' CUDA devices, in the order of local ranks.
        workers: how many there are.
        environ: in which a person may have bound threads otherwise.
    """
    if len(allowed) != granted or workers < 2 or any(name in environ for name in OPENMP_BINDING):
        return ()
    topology = see_topology()
    near: list[int | None] = [None] * workers
    if devices and len({topology.numa.get(cpu) for cpu in allowed}) > 1:
        nodes = gpu_nodes()
        near = [nodes.get(devices[rank]) if rank < len(devices) else None for rank in range(workers)]
    return share_cores(allowed, near, topology)


def share_cores(
    allowed: Sequence[int], near: Sequence[int | None], topology: CpuTopology
) -> tuple[tuple[int, ...], ...]:
    """Divide logical CPUs among workers, as equally as they can be; empty where there are more workers.

    Args:
        allowed: the CPUs.
        near: for each worker the NUMA node of its GPU, None where that is not known.
        topology: of this machine.
    """
    share = len(allowed) // len(near)
    if not share:
        return ()
    # Neighbours first: CPUs of a core, then cores of a NUMA node.
    left = sorted(allowed, key=lambda cpu: (topology.numa.get(cpu, 0), topology.siblings.get(cpu, cpu), cpu))
    shares: list[list[int]] = [[] for _ in near]
    for own, node in zip(shares, near, strict=True):
        if node is not None:
            own += [cpu for cpu in left if topology.numa.get(cpu) == node][:share]
            left = [cpu for cpu in left if cpu not in own]
    for own in shares:
        missing = share - len(own)
        own += left[:missing]
        left = left[missing:]
    for own, cpu in zip(shares, left, strict=False):  # fewer than there are workers
        own.append(cpu)
    return tuple(tuple(sorted(own)) for own in shares)


def see_topology(root: Path = Path("/")) -> CpuTopology:
    """Read where the cores of this machine are; what the system does not say is left out."""
    system = root / "sys/devices/system"
    numa: dict[int, int] = {}
    siblings: dict[int, int] = {}
    for path in system.glob("node/node[0-9]*/cpulist"):
        numa |= dict.fromkeys(_cpus(path), int(path.parent.name.removeprefix("node")))
    for path in system.glob("cpu/cpu[0-9]*/topology/thread_siblings_list"):
        siblings[int(path.parents[1].name.removeprefix("cpu"))] = min(_cpus(path), default=-1)
    return CpuTopology(numa, siblings)


def gpu_nodes(root: Path = Path("/")) -> dict[str, int]:
    """The NUMA nodes of NVIDIA's GPUs, by their index and by their UUID; without those of which it is not known."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        listed = subprocess.run(
            query, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, int] = {}
    for line in listed.stdout.splitlines():
        index, _, rest = line.partition(", ")
        uuid, _, address = rest.partition(", ")
        if bus := _BUS.fullmatch(address.strip()):
            with contextlib.suppress(OSError, ValueError):
                node = int((root / "sys/bus/pci/devices" / bus[1].lower() / "numa_node").read_text())
                if node >= 0:  # -1 where the machine does not say
                    found |= {index: node, uuid: node}
    return found


def _cpus(path: Path) -> list[int]:
    """The CPUs of a list such as `0-3,8-11`; none where it cannot be read."""
    cpus: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    return cpus
