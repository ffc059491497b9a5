"""A job of LSF, PBS (OpenPBS, Torque) or Grid Engine: the script that the scheduler starts on the job's first machine.

These schedulers start one process for a job and say which machines it has; starting something on the others is the
script's affair. So a process that is nobody else's is a world of one, and is told where it leaves machines unused.
`launch/hosts.sh` uses them all: there `allstep run` has its place by options.

- LSF: LSB_MCPU_HOSTS is names of machines, each followed by its number of slots.
- PBS: PBS_NODEFILE names a file with a machine's name on a line for each slot. The file is on the first machine only.
- Grid Engine: NHOSTS is the number of machines.

What cannot be read counts as one machine: the number is for a warning only, and nothing fails for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from allstep.placement.placement import Placement

USES_ALL = "to use them all start it by launch/hosts.sh, or with --nnodes, --node-rank and --rdzv on each"


def job_machines(environ: Mapping[str, str]) -> int:
    """How many machines a job of one of these schedulers has; 1 outside of any."""
    if "LSB_JOBID" in environ:
        return len(set(environ.get("LSB_MCPU_HOSTS", "").split()[::2])) or 1
    if "PBS_JOBID" in environ and "PBS_NODEFILE" in environ:
        with contextlib.suppress(OSError, UnicodeError), open(environ["PBS_NODEFILE"], encoding="utf-8") as file:
            return len({line.split()[0] for line in file if line.strip()}) or 1
    if "SGE_TASK_ID" in environ and (hosts := environ.get("NHOSTS", "")).isdecimal() and len(hosts) < 8:
        return int(hosts) or 1
    return 1


class SchedulerScript:
    """The one process that LSF, PBS or Grid Engine starts for a job."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether this is in a job of one of them."""
        return any(variable in environ for variable in ("LSB_JOBID", "PBS_JOBID", "SGE_TASK_ID"))

    def place(self, environ: Mapping[str, str]) -> Placement:
        """A world of one, with a warning where the job has more machines."""
        machines = job_machines(environ)
        warning = f"the job has {machines} machines, but this process trains alone; {USES_ALL}"
        job = environ.get("LSB_JOBID") or environ.get("PBS_JOBID") or environ.get("JOB_ID", "")
        return Placement(launcher="alone", run_id=job, warnings=(warning,) if machines > 1 else ())
