"""A machine with many faults at once, what `allstep doctor` is to say of each, and the same machine without any.

Contract: `look_at_ill` and `look_at_healthy` run the doctor in a folder and return what it said. Faults are put in with
namespaces of mounts, names and network, a folder of programs before PATH, limits of the process, and variables; nothing
of the machine itself is touched. The tests and `benchmarks/named_faults.py` share them. Namespaces need root.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from allstep.host_checks import HostFinding, Verdict
from tests.jobs.launchers import ALLSTEP
from tests.jobs.running import start

_ALONE = ["unshare", "--mount", "--uts", "--net", "--propagation", "private", "sh", "-ec"]

_ILL = """
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount -t tmpfs -o size=1m tmpfs "$1/runs"
echo a-name-of-no-host > /proc/sys/kernel/hostname
ip link set lo up
ulimit -n 300
shift
exec "$@"
"""
_ILL_SLURM = """#!/bin/sh
case "$*" in
ping) echo "Slurmctld(primary) at head is UP" ;;
*config) printf '%s\\n' 'JobRequeue = 0' 'KillWait = 5 sec' 'ProctrackType = proctrack/linuxproc' \\
  'TaskPlugin = task/none' 'MpiDefault = pmix' 'KillOnBadExit = 0' 'SLURM_VERSION = 22.05.8' ;;
*) echo "PartitionName=main PreemptMode=REQUEUE GraceTime=0 State=UP" ;;
esac
"""


@dataclass(frozen=True)
class MachineFault:
    """A fault of the ill machine, and the finding in which it is to be named."""

    what: str
    subject: str
    verdict: Verdict
    words: str


FAULTS = (
    MachineFault("another environment is active", "python", "warning", "/some/other/environment is the active"),
    MachineFault("torch crashes when it is imported", "torch", "bad", "importing torch fails: "),
    MachineFault("the host's name does not resolve", "host name", "warning", "'a-name-of-no-host', does not resolve"),
    MachineFault(
        "gloo is told of an interface that is not there", "interfaces", "bad", "GLOO_SOCKET_IFNAME is 'eth9', and this"
    ),
    MachineFault(
        "NCCL is told of an interface that is not there", "interfaces", "bad", "NCCL_SOCKET_IFNAME is 'ib', and this"
    ),
    MachineFault("no network beside loopback", "interfaces", "bad", "only the loopback interface has an address"),
    MachineFault(
        "MASTER_ADDR does not resolve", "ports", "bad", "MASTER_ADDR is 'nowhere.invalid', which does not resolve"
    ),
    MachineFault("64 MiB of shared memory", "shared memory", "bad", "64 MiB free of 64 MiB"),
    MachineFault("300 open files", "limits", "bad", "may open 300 files"),
    MachineFault("OMP_NUM_THREADS is 999", "cores", "warning", "OMP_NUM_THREADS is 999 for 2 ranks"),
    MachineFault("the folder for runs is in memory", "folder", "warning", "is kept in memory"),
    MachineFault("the folder for runs is full", "folder", "bad", "1 MiB free"),
    MachineFault(
        "no checkpoint fits there", "folder", "bad", "a file of some megabytes cannot be written: No space left"
    ),
    MachineFault("SLURM does not requeue", "SLURM", "warning", "JobRequeue=0"),
    MachineFault("SLURM kills 5 s after SIGTERM", "SLURM", "warning", "5 s between SIGTERM and SIGKILL"),
    MachineFault("preemption leaves no time", "SLURM", "warning", "main is preempted without time to save"),
    MachineFault("SLURM loses track of processes", "SLURM", "warning", "ProctrackType=proctrack/linuxproc"),
    MachineFault("jobs are not confined", "SLURM", "warning", "TaskPlugin=task/none"),
    MachineFault("srun starts tasks for MPI", "SLURM", "warning", "MpiDefault=pmix"),
    MachineFault("srun goes on without a failed task", "SLURM", "warning", "KillOnBadExit=0"),
)
"""All of the ill machine's."""


def program(folder: Path, name: str, text: str) -> None:
    """Put a program into a folder that is then searched first."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def torch_that(folder: Path, text: str) -> dict[str, str]:
    """The environment in which `import torch` runs this text."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


@dataclass(frozen=True)
class Examination:
    """What the doctor found, its exit code, and the seconds that it took."""

    findings: list[HostFinding]
    code: int
    seconds: float

    def names(self, fault: MachineFault) -> bool:
        """Whether one finding is about the fault, with the verdict that it should have and a remedy."""
        fitting = [each for each in self.findings if each.subject == fault.subject and fault.words in each.text]
        return [each.verdict for each in fitting] == [fault.verdict] and bool(fitting[0].remedy)

    @property
    def ill(self) -> list[HostFinding]:
        """All that is not good."""
        return [each for each in self.findings if each.verdict != "good"]


def examine(folder: Path, *options: str, env: Mapping[str, str], around: list[str] | None = None) -> Examination:
    """Run `allstep doctor` in a folder, with programs of `folder/programs` before others."""
    shell = {
        "PATH": f"{folder / 'programs'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        **dict.fromkeys(
            ("VIRTUAL_ENV", "CONDA_PREFIX"), ""
        ),  # one that is active around the tests is not the machine's
    }
    with start(folder, [*(around or ()), *ALLSTEP, "doctor", "--json", *options], env=shell | dict(env)) as running:
        job = running.end()
    assert job.code in (0, 1), job.text
    return Examination([HostFinding(**each) for each in json.loads(job.out)], job.code, job.ended - job.began)


def look_at_ill(folder: Path) -> Examination:
    """Put all faults in and look."""
    (folder / "runs").mkdir(exist_ok=True)
    program(folder / "programs", "scontrol", _ILL_SLURM)
    env = {
        **torch_that(folder / "packages", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"),
        "GLOO_SOCKET_IFNAME": "eth9",
        "NCCL_SOCKET_IFNAME": "ib",
        "MASTER_ADDR": "nowhere.invalid",
        "OMP_NUM_THREADS": "999",
        "VIRTUAL_ENV": "/some/other/environment",
    }
    around = [*_ALONE, _ILL, "sh", str(folder)]
    return examine(folder, "--nnodes", "2", "--nproc", "2", env=env, around=around)


def look_at_healthy(folder: Path) -> Examination:
    """Look at this machine as it is; a torch that other tests hold up has a minute."""
    return examine(folder, "--timeout", "60", env={})
