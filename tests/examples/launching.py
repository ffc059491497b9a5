"""Run a file of `examples/` as a user would, under each launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIMIT = 110.0

_OF_A_LAUNCHER = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM", "ALLSTEP_RUN")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCHER)}
    return clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(extra or {})


def run(launcher: Sequence[str], example: str, *arguments: object, folder: Path) -> str:
    """What the example printed; fails with its errors if it failed."""
    done = subprocess.run(
        [*launcher, str(EXAMPLES / example), *map(str, arguments)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_step_tasks(example: str, *arguments: object, tasks: int, job: int, folder: Path) -> str:
    """Start the example once per task, each with the environment that `srun` gives the tasks of a step on one node."""
    processes = []
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
        processes.append(
            subprocess.Popen(
                [sys.executable, str(EXAMPLES / example), *map(str, arguments)],
                cwd=folder,
                env=environment(step),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    deadline = time.monotonic() + LIMIT
    try:
        outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * tasks, "\n".join(outputs)
    return "".join(outputs)
