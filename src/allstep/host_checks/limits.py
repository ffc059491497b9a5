"""What this process may use of the machine: shared memory, descriptors, processes, memory and cores.

Ranks inherit all of it. Each `check_` reads, and its `judge_` decides.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from allstep.host_checks.cgroups import smallest, texts
from allstep.host_checks.finding import Host, HostFinding, graded, in_bytes
from allstep.monitor.memory import counters, kills_for_memory
from allstep.protocol.foreign_text import one_line

MIB, GIB = 1 << 20, 1 << 30

SHARED_LEAST = 64 * MIB
"""Free shared memory below which a large batch ends a loader's worker; Docker gives as much by default."""
SHARED_WANTED = GIB
DESCRIPTORS_WANTED = 4096
"""Open files and sockets that one process may come to need with many ranks, loaders' workers and checkpoints."""
DESCRIPTORS_LEAST = 512
PROCESSES_WANTED, PROCESSES_LEAST = 64, 8  # threads and processes a rank, by loaders, OpenMP and gloo
MEMORY_A_RANK = GIB
SMALL_SHARE = 1 / 16  # of the machine's memory


def check_shared_memory(host: Host, folder: Path = Path("/dev/shm")) -> Iterator[HostFinding]:
    """The size of /dev/shm, through which workers of a loader hand over batches, and NCCL its messages."""
    if not sys.platform.startswith("linux"):
        yield HostFinding("shared memory", "good", "this system has no limit of its own for it")
        return
    try:
        found = os.statvfs(folder)
    except OSError as error:
        text = f"{folder} is not there: {error.strerror}"
        yield HostFinding("shared memory", "bad", text, f"mount -t tmpfs -o size=50% tmpfs {folder}")
        return
    if not os.access(folder, os.W_OK):
        yield HostFinding(
            "shared memory", "bad", f"{folder} cannot be written", f"chmod 1777 {folder}, by the administrator"
        )
        return
    yield judge_shared_memory(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def judge_shared_memory(size: int, free: int) -> HostFinding:
    """Decide by bytes."""
    text = f"/dev/shm has {in_bytes(free)} free of {in_bytes(size)}"
    if size and free > SHARED_WANTED:
        return HostFinding("shared memory", "good", text)
    remedy = (
        "Start the container with --shm-size=16g or --ipc=host; else mount -o remount,size=16g /dev/shm"
        if size <= 2 * SHARED_WANTED
        else "Remove what programs that are gone left in /dev/shm"
    )
    verdict = graded(bad=free <= SHARED_LEAST)
    return HostFinding("shared memory", verdict, f"{text}; workers of data loaders need more", remedy)


def check_resource_limits(host: Host) -> Iterator[HostFinding]:
    """How many files, threads and locked pages a process may have."""
    files = _unlimited(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    processes = _processes_left(host)
    locked = _unlimited(resource.getrlimit(resource.RLIMIT_MEMLOCK)[1])
    infiniband = bool(host.names("sys/class/infiniband"))
    yield from judge_resource_limits(files, processes, locked if infiniband else math.inf, host.ranks())


def judge_resource_limits(files: float, processes: float, locked: float, ranks: int) -> Iterator[HostFinding]:
    """Decide by what may still be used.

    Args:
        files: descriptors that a process may have open, after it has raised its limit to what it may.
        processes: processes and threads that can still be started.
        locked: bytes that may be locked in memory; infinite where nothing needs that.
        ranks: of this machine.
    """
    ill = False
    if files < DESCRIPTORS_WANTED:
        ill = True
        verdict = graded(bad=files < DESCRIPTORS_LEAST)
        text = f"a process may open {files:.0f} files and sockets (RLIMIT_NOFILE)"
        yield HostFinding(
            "limits", verdict, text, "ulimit -Hn 65536, in limits.conf or in the unit that starts the job"
        )
    if processes < PROCESSES_WANTED * ranks:
        ill = True
        verdict = graded(bad=processes < PROCESSES_LEAST * ranks)
        text = f"{max(processes, 0):.0f} more threads and processes can be started, for {_counted(ranks, 'rank')}"
        yield HostFinding(
            "limits", verdict, text, "Raise ulimit -u, or the cgroup's pids.max (Docker: --pids-limit=-1)"
        )
    if locked < math.inf:
        ill = True
        verdict = graded(bad=locked < 64 * MIB)
        text = f"{in_bytes(locked)} may be locked in memory (RLIMIT_MEMLOCK), which InfiniBand needs without a limit"
        yield HostFinding(
            "limits", verdict, text, "ulimit -l unlimited, in limits.conf or in slurmd's unit (LimitMEMLOCK)"
        )
    if not ill:
        shown = "any number of" if files == math.inf else f"{files:.0f}"
        yield HostFinding("limits", "good", f"{shown} open files; threads and processes enough")


def check_memory(host: Host) -> Iterator[HostFinding]:
    """The memory that this process's cgroup may use, and whether it has had to kill for it."""
    cgroups = host.read("proc/self/cgroup")
    kills = [kills_for_memory(each.read_text()) or 0 for each in counters(cgroups, host.root / "sys/fs/cgroup")]
    total = next(
        (int(line.split()[1]) << 10 for line in host.read("proc/meminfo").splitlines() if line.startswith("MemTotal:")),
        psutil.virtual_memory().total,
    )
    limit = smallest(texts(host, "memory", "memory.max", "memory.limit_in_bytes"))
    yield from judge_memory(total, limit, sum(kills), host.ranks())


def judge_memory(total: int, limit: int | None, kills: int, ranks: int) -> Iterator[HostFinding]:
    """Decide by bytes and by the kernel's count of processes that it killed."""
    usable = total if limit is None else min(total, limit)
    of = f"{in_bytes(usable)} of the machine's {in_bytes(total)}" if usable < total else in_bytes(total)
    remedy = "Ask for more memory (sbatch --mem=0 for all of the node, docker run --memory), or start fewer ranks"
    if kills:
        text = (
            f"in this memory cgroup the kernel has killed {_counted(kills, 'process', 'processes')} for want of memory"
        )
        yield HostFinding("memory", "warning", text, remedy)
    if usable < MEMORY_A_RANK * ranks:
        yield HostFinding("memory", "bad", f"{of} for {_counted(ranks, 'rank')}: less than 1 GiB each", remedy)
    elif usable < SMALL_SHARE * total:
        yield HostFinding("memory", "warning", f"this memory cgroup may use only {of}", remedy)
    elif not kills:
        yield HostFinding("memory", "good", of)


def check_cores(host: Host) -> Iterator[HostFinding]:
    """Cores, their quota, and how many threads the ranks would start on them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield from judge_cores(cores, cpu_quota(host), host.environ.get("OMP_NUM_THREADS"), host.ranks())


def cpu_quota(host: Host) -> float:
    """Cores' worth of time that the cgroup gives; infinite where it sets no quota."""
    quotas = [math.inf]
    for text in texts(host, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota, period = (*text.split(), "")[:2]
        # Version 1 has the period in a file of its own.
        period = period or next(iter(texts(host, "cpu", "cpu.max", "cpu.cfs_period_us")), "100000")
        if quota.isdecimal() and period.isdecimal():
            quotas.append(int(quota) / int(period))
    return min(quotas)


def judge_cores(cores: int, quota: float, threads: str | None, ranks: int) -> Iterator[HostFinding]:
    """Compare threads with cores.

    Args:
        cores: that this process may use.
        quota: cores' worth of time; infinite where there is no quota.
        threads: OMP_NUM_THREADS, or None.
        ranks: of this machine.
    """
    usable = min(cores, quota)
    each = max(1, int(usable / ranks))
    remedy = f"allstep run --env OMP_NUM_THREADS={each}"
    if threads is not None and not all(part.strip().isdecimal() for part in threads.split(",")):
        yield HostFinding("cores", "warning", f"OMP_NUM_THREADS is {one_line(threads)!r}, which is no number", remedy)
        return
    if ranks > usable:
        text = f"{_counted(ranks, 'rank')} on {_counted(int(usable), 'core')}: they will wait for each other's turn"
        more = "Ask for more cores (sbatch --cpus-per-task, docker run --cpus), or start fewer ranks"
        yield HostFinding("cores", "warning", text, more)
    elif threads is not None and int(threads.split(",")[0]) * ranks > max(usable, ranks):
        text = f"OMP_NUM_THREADS is {threads} for {_counted(ranks, 'rank')} on {usable:g} cores"
        yield HostFinding("cores", "warning", text, remedy)
    elif threads is None and quota < cores:
        text = f"a quota of {quota:g} cores on {cores}: torch would start {cores} threads, which are then held up"
        yield HostFinding("cores", "warning", text, remedy)
    else:
        yield HostFinding("cores", "good", f"{_counted(cores, 'core')} for {_counted(ranks, 'rank')}")


def _processes_left(host: Host) -> float:
    """Threads and processes that can still be started, by the limit of this user and by that of the cgroup."""
    left = math.inf
    limit = _unlimited(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    if limit < math.inf and os.geteuid() != 0:  # the kernel does not count for the administrator
        own = os.getuid()
        used = 0
        for process in psutil.process_iter(["uids", "num_threads"]):
            uids = process.info["uids"]
            used += process.info["num_threads"] or 1 if uids and uids.real == own else 0
        left = limit - used
    most = smallest(texts(host, "pids", "pids.max", "pids.max"))
    current = smallest(texts(host, "pids", "pids.current", "pids.current")[:1])
    if most is not None:
        left = min(left, most - (current or 0))
    return left


def _unlimited(limit: int) -> float:
    return math.inf if limit == resource.RLIM_INFINITY else limit


def _counted(count: int, thing: str, things: str = "") -> str:
    return f"{count} {thing if count == 1 else things or thing + 's'}"
