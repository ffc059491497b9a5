"""What each worker will be started with, decided before anything is started: pure functions, tested as tables.

Contract: `plan_workers` gives one `WorkerPlan` per rank on this machine, in rank order; the supervisor starts them as
they are. `worker_count` says how many.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from allstep.launch.devices import Devices, device_environment
from allstep.launch.environment import worker_environment
from allstep.launch.settings import LaunchSettings

BOOTSTRAP = str(Path(__file__).with_name("worker.py"))
"""Started by its path, so that nothing in the current folder can stand in for a module that it imports."""


@dataclass(frozen=True, slots=True)
class Command:
    """What a person wants run: a script's path, or a module's name if `module`, and its arguments."""

    target: str
    arguments: tuple[str, ...] = ()
    module: bool = False


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to start: its run and place in it, its whole environment, and what its bootstrap is to run."""

    run_id: str
    rank: int
    world_size: int
    environment: Mapping[str, str]
    command: Command

    def command_line(self, supervisor_pid: int, lifeline: int) -> list[str]:
        """Return the command line, for a supervisor of this pid that holds the other end of the pipe `lifeline`."""
        kind = "module" if self.command.module else "script"
        place = [str(supervisor_pid), str(lifeline), kind]
        return [sys.executable, BOOTSTRAP, *place, self.command.target, *self.command.arguments]


def worker_count(settings: LaunchSettings, devices: Devices) -> int:
    """Return the number of workers to start on this machine."""
    return settings.nproc if settings.nproc != "auto" else len(devices.names) or settings.cpu_processes


def plan_workers(
    settings: LaunchSettings,
    command: Command,
    *,
    environ: Mapping[str, str],
    devices: Devices,
    cores: int,
    port: int,
    run_id: str,
    attempt: int = 0,
) -> tuple[WorkerPlan, ...]:
    """Plan the workers of a one-machine run.

    Args:
        environ: what the workers inherit.
        devices: the CUDA devices that they share.
        cores: CPU cores that this process may use.
        port: the port on which rank 0 will serve the store.
        run_id: the run's name.
        attempt: 0 for the first start of the run.
    """
    workers = worker_count(settings, devices)
    inherited = {**environ, **settings.env}
    inherited.setdefault("PYTHONUNBUFFERED", "1")
    if workers > 1:
        inherited.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    return tuple(
        WorkerPlan(
            run_id=run_id,
            rank=rank,
            world_size=workers,
            environment=inherited
            | device_environment(devices, rank, workers)
            | worker_environment(
                rank=rank,
                world_size=workers,
                local_rank=rank,
                local_world_size=workers,
                master_addr="127.0.0.1",
                master_port=port,
                run_id=run_id,
                attempt=attempt,
            ),
            command=command,
        )
        for rank in range(workers)
    )
