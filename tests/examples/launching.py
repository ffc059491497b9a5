"""Run a file of `examples/` as a user would, under each launcher."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.jobs import running
from tests.jobs.job import Job
from tests.jobs.launchers import ALLSTEP, ROOT

EXAMPLES = ROOT / "examples"

ALONE = [sys.executable]
TWO_RANKS = [*ALLSTEP, "run", "--nproc", "2"]
THREE_RANKS = [*ALLSTEP, "run", "--nproc", "3"]
_CALM = {"OMP_NUM_THREADS": "1"}


def job_of(launcher: Sequence[str], script: Path, *arguments: object, folder: Path) -> Job:
    """Run a script to its end."""
    return running.run(folder, script, *map(str, arguments), command=launcher, env=_CALM)


def run(launcher: Sequence[str], example: str, *arguments: object, folder: Path) -> str:
    """What the example printed; fails with all that it said if it failed."""
    job = job_of(launcher, EXAMPLES / example, *arguments, folder=folder)
    assert job.code == 0, job.text
    return job.out


def run_step_tasks(example: str, *arguments: object, tasks: int, job: int, folder: Path) -> str:
    """Start the example once per task, each with the environment that `srun` gives the tasks of a step on one node."""
    argv = [sys.executable, EXAMPLES / example, *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        started = []
        for task in range(tasks):
            step = {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": str(tasks),
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_STEP_NODELIST": "n1",
                "SLURM_STEP_TASKS_PER_NODE": str(tasks),
                "SLURM_PROCID": str(task),
                "SLURM_LOCALID": str(task),
                "SLURM_NODEID": "0",
            }
            started.append(stack.enter_context(running.start(folder, argv, env=_CALM | step)))
        ended = [each.end() for each in started]
    assert [each.code for each in ended] == [0] * tasks, "\n".join(each.text for each in ended)
    return "".join(each.out + each.err for each in ended)
