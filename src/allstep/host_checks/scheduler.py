"""What SLURM's settings mean for a job that is to be stopped, saved and queued again.

Contract: `scontrol` is asked three times, each bounded. `judge_settings` is given what `scontrol show config` and
`scontrol show partition` print. A machine that has SLURM's programs and belongs to no cluster is well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from allstep.host_checks.finding import Host, HostFinding, ask
from allstep.protocol.foreign_text import one_line

SHORT_S = 30
"""Seconds between SIGTERM and SIGKILL, as SLURM has it by default."""

_NO_CLUSTER = re.compile(r"configuration source|configuration file|fetch config", re.IGNORECASE)


def check_slurm(host: Host) -> Iterator[HostFinding]:
    """The controller and its settings."""
    bound = host.within / 3
    try:
        ping = ask(["scontrol", "ping"], host, bound)
    except FileNotFoundError:
        yield HostFinding("SLURM", "good", "not installed here")
        return
    config = ask(["scontrol", "show", "config"], host, bound) if not ping.problem else ping
    if config.problem:
        if _NO_CLUSTER.search(config.problem) and not {"SLURM_JOB_ID", "SLURM_CONF"} & set(host.environ):
            yield HostFinding("SLURM", "good", "its programs are installed, and this machine belongs to no cluster")
            return
        remedy = "Ask the administrator whether slurmctld runs; `scontrol ping` shows it"
        yield HostFinding("SLURM", "bad", f"its controller cannot be asked: {config.problem}", remedy)
        return
    partitions = ask(["scontrol", "--oneliner", "show", "partition"], host, bound)
    own = host.environ.get("SLURM_JOB_PARTITION")
    yield from judge_settings(read_settings(config.out), read_partitions(partitions.out, own))


def read_settings(text: str) -> dict[str, str]:
    """What `scontrol show config` prints."""
    found = (re.match(r"(\w+)\s*=\s*(.*?)\s*$", line) for line in text.splitlines())
    return {each[1]: each[2] for each in found if each}


def read_partitions(text: str, own: str | None) -> dict[str, dict[str, str]]:
    """What `scontrol --oneliner show partition` prints, of all partitions or of the job's own."""
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    named = {row["PartitionName"]: row for row in rows if "PartitionName" in row}
    return {own: named[own]} if own in named and own is not None else named


def judge_settings(settings: Mapping[str, str], partitions: Mapping[str, Mapping[str, str]]) -> Iterator[HostFinding]:
    """Say what a person has to know of these settings, each with what to do."""
    ill = list(_unsuited(settings, partitions))
    yield from ill
    version = one_line(settings.get("SLURM_VERSION", "of unknown version"))
    cluster = one_line(settings.get("ClusterName", "without a name"))
    if not ill:
        yield HostFinding("SLURM", "good", f"{version}, cluster {cluster}")


def _unsuited(settings: Mapping[str, str], partitions: Mapping[str, Mapping[str, str]]) -> Iterator[HostFinding]:
    if settings.get("JobRequeue") == "0":
        text = "a job is not queued again when it was preempted or its node failed (JobRequeue=0)"
        yield HostFinding("SLURM", "warning", text, "sbatch --requeue")
    wait = _leading_number(settings.get("KillWait", ""))
    if wait is not None and wait < SHORT_S:
        text = f"at its time limit a job has {wait} s between SIGTERM and SIGKILL (KillWait)"
        yield HostFinding(
            "SLURM", "warning", text, "sbatch --signal=USR1@120, for a signal that comes early enough to save"
        )
    for name, each in partitions.items():
        preempts = each.get("PreemptMode", "OFF").upper() not in ("OFF", "SUSPEND", "GANG", "")
        grace = _leading_number(each.get("GraceTime", "0"))
        if preempts and grace == 0:
            text = f"a job in partition {one_line(name)} is preempted without time to save (GraceTime=0)"
            yield HostFinding(
                "SLURM", "warning", text, "Save often (Checkpoint), or ask the administrator for GraceTime=120"
            )
    tracking = settings.get("ProctrackType", "")
    if tracking and not tracking.endswith("/cgroup"):
        text = f"processes that leave their session outlive their job (ProctrackType={one_line(tracking)})"
        yield HostFinding("SLURM", "warning", text, "Ask the administrator for ProctrackType=proctrack/cgroup")
    plugins = settings.get("TaskPlugin", "")
    if "task/cgroup" not in plugins:
        text = f"jobs are not kept to their own cores, memory and devices (TaskPlugin={one_line(plugins) or 'none'})"
        yield HostFinding("SLURM", "warning", text, "Ask the administrator for TaskPlugin=task/cgroup,task/affinity")
    elif "gpu" in settings.get("GresTypes", "") and settings.get("ConstrainDevices", "no") != "yes":
        text = "a job can use GPUs that were given to another (ConstrainDevices=no)"
        yield HostFinding("SLURM", "warning", text, "Ask the administrator for ConstrainDevices=yes in cgroup.conf")
    mpi = settings.get("MpiDefault", "none")
    if mpi not in ("none", "(null)", ""):
        text = f"srun starts every task for MPI (MpiDefault={one_line(mpi)}), and fails where that is not installed"
        yield HostFinding("SLURM", "warning", text, "srun --mpi=none, since allstep needs no MPI")
    if settings.get("KillOnBadExit", "0") == "0":
        text = "srun lets the other tasks run on where one has failed (KillOnBadExit=0)"
        yield HostFinding("SLURM", "warning", text, "srun --kill-on-bad-exit=1 (ranks of allstep leave by themselves)")


def _leading_number(text: str) -> int | None:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else None
