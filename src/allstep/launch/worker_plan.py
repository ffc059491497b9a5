"""What each worker will be started with, decided before anything is started: pure functions, tested as tables.

Contract: `worker_count` says how many workers a machine has, from the settings and its devices. `plan_workers` gives
one `WorkerPlan` per rank on this machine, in rank order, from this machine's `Share` of an attempt; the supervisor
starts them as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allstep.errors import ConfigurationError, MeshError
from allstep.launch.device_types import VARIABLE as DEVICE
from allstep.launch.devices import Devices, device_environment
from allstep.launch.environment import worker_environment
from allstep.launch.settings import LaunchSettings
from allstep.monitor.collective_record import PREFIX
from allstep.placement import Placement, Rendezvous, parse_mesh, resolve_mesh
from allstep.protocol.status_frames import VARIABLE as STATUS_LINE
from allstep.protocol.user_secret import VARIABLE as SECRET

BOOTSTRAP = str(Path(__file__).with_name("worker.py"))
"""Started by its path, so that nothing in the current folder can stand in for a module that it imports."""

# Where nccl's flight recorder is written when nccl ends the process; torch before 2.9 reads the second one alone.
_RECORD_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


@dataclass(frozen=True, slots=True)
class Command:
    """What a person wants run: a script's path, or a module's name if `module`, and its arguments."""

    target: str
    arguments: tuple[str, ...] = ()
    module: bool = False

    def words(self) -> list[str]:
        """Return the words for it in a worker's command line."""
        return ["module" if self.module else "script", self.target, *self.arguments]


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to start: its run and place in it, its whole environment, and what its bootstrap is to run.

    `descriptors` is how many it may open; None leaves it what this process may. `store_fd` is the socket that it is to
    serve the ranks' store on, a descriptor of this process, where that is its part. `has_terminal`: it has this
    process's own standard streams in place of pipes, for a person who debugs it. `cores` are the CPUs that it runs on;
    empty: any that this process may use.
    """

    run_id: str
    rank: int
    world_size: int
    environment: Mapping[str, str]
    command: Command
    descriptors: int | None = None
    store_fd: int | None = None
    has_terminal: bool = False
    cores: tuple[int, ...] = ()

    def command_line(self, supervisor_pid: int, lifeline: int) -> list[str]:
        """Return the command line, for a supervisor of this pid that holds the other end of the pipe `lifeline`."""
        return [sys.executable, BOOTSTRAP, str(supervisor_pid), str(lifeline), *self.command.words()]


def worker_count(settings: LaunchSettings, devices: Devices) -> int:
    """Return the number of workers to start on this machine."""
    return settings.nproc if settings.nproc != "auto" else devices.count or settings.cpu_processes


@dataclass(frozen=True, slots=True)
class Share:
    """This machine's part of one attempt.

    Args:
        run_id: the run's name.
        attempt: which start of all workers this is, as its folder and monitoring count.
        key: what ranks and monitoring prove to each other that they have.
        channel: where this machine's monitoring service listens, HOST:PORT.
        master_addr: the host on which rank 0 will serve the store.
        master_port: the port for that.
        workers: ranks on this machine.
        first_rank: the first of them.
        world_size: ranks on all machines.
        node_rank: which machine this is.
        nodes: how many machines there are.
        max_restarts: the highest attempt that there may be.
        folder: where this attempt's files go, or None for nowhere.
        store_fd: the socket at `master_port`, where this machine has rank 0.
    """

    run_id: str
    attempt: int
    key: str
    channel: str
    master_addr: str
    master_port: int
    workers: int
    first_rank: int
    world_size: int
    node_rank: int = 0
    nodes: int = 1
    max_restarts: int = 0
    folder: Path | None = None
    store_fd: int | None = None

    @property
    def ranks(self) -> range:
        """The ranks on this machine."""
        return range(self.first_rank, self.first_rank + self.workers)


def plan_workers(
    settings: LaunchSettings,
    command: Command,
    share: Share,
    *,
    environ: Mapping[str, str],
    devices: Devices,
    cores: int,
    bound: Sequence[tuple[int, ...]] = (),
    descriptors: int | None = None,
    status_columns: int | None = None,
) -> tuple[WorkerPlan, ...]:
    """Plan the workers of one attempt on this machine.

    Args:
        settings: what was asked for.
        command: what each worker is to run.
        share: this machine's part.
        environ: what the workers inherit.
        devices: the CUDA devices that they share.
        cores: CPU cores that this process may use.
        bound: which of them each worker runs on, in the order of local ranks; empty: any of them.
        descriptors: how many each may open, where that is not what this process may.
        status_columns: how wide a status line of theirs may be; None where it would not be shown.
    """
    inherited = {**environ, **settings.env}
    inherited.pop("ALLSTEP_ATTEMPT_FOLDER", None)  # of a run that this one was started in
    inherited.pop("ALLSTEP_STORE_FD", None)
    inherited.pop(STATUS_LINE, None)
    if status_columns is not None:
        inherited[STATUS_LINE] = str(status_columns)
    inherited.pop(SECRET, None)  # the machines' own; whoever has it can join any run of this user
    inherited.setdefault("PYTHONUNBUFFERED", "1")  # into a pipe Python would hold lines back that are to be seen
    if share.workers > 1:  # otherwise each would start as many threads as there are cores
        inherited.setdefault("OMP_NUM_THREADS", str(max(1, cores // share.workers)))
    if settings.limits is not None:
        inherited["ALLSTEP_LIMITS"] = settings.limits
    if settings.device is not None:
        inherited[DEVICE] = settings.device
    if settings.mesh is not None:
        _check_mesh(settings.mesh, share)
        inherited["ALLSTEP_MESH"] = settings.mesh
    # One with our own prefix is of a run that this one was started in.
    if share.folder is not None and all(inherited.get(name, PREFIX).endswith(PREFIX) for name in _RECORD_FILES):
        inherited.update(dict.fromkeys(_RECORD_FILES, str(share.folder.resolve() / PREFIX)))
    if settings.fault is not None:
        inherited["ALLSTEP_FAULT"] = settings.fault
    if settings.resume is not None:
        inherited["ALLSTEP_RESUME"] = settings.resume
    if settings.take_over:
        inherited["ALLSTEP_TAKE_OVER"] = "1"
    if settings.debug_rank is not None:
        if settings.debug_rank not in share.ranks and share.nodes == 1:
            raise ConfigurationError(
                f"debug_rank is {settings.debug_rank}, and the ranks are {share.ranks[0]} to {share.ranks[-1]}"
            )
        inherited["ALLSTEP_DEBUG_RANK"] = str(settings.debug_rank)
    return tuple(
        WorkerPlan(
            run_id=share.run_id,
            rank=rank,
            world_size=share.world_size,
            environment=inherited  # what follows wins over it
            | device_environment(devices, local_rank, share.workers)
            | worker_environment(
                rank=rank,
                world_size=share.world_size,
                local_rank=local_rank,
                local_world_size=share.workers,
                master_addr=share.master_addr,
                master_port=share.master_port,
                run_id=share.run_id,
                attempt=share.attempt,
                max_restarts=share.max_restarts,
                node_rank=share.node_rank,
                nodes=share.nodes,
                channel=share.channel,
                key=share.key,
                # Absolute: a script may change its folder before it asks.
                attempt_folder=str(share.folder.resolve()) if share.folder is not None else None,
                store_fd=share.store_fd if rank == 0 else None,
            ),
            command=command,
            descriptors=descriptors,
            store_fd=share.store_fd if rank == 0 else None,
            has_terminal=rank == settings.debug_rank,
            cores=bound[local_rank] if bound else (),
        )
        for local_rank, rank in enumerate(share.ranks)
    )


def _check_mesh(mesh: str, share: Share) -> None:
    """Raise ConfigurationError where a mesh does not fit the ranks, before any of them is started."""
    place = Placement(
        "allstep",
        rank=share.first_rank,
        world_size=share.world_size,
        local_world_size=share.workers,
        node_rank=share.node_rank,
        nodes=share.nodes,
        rendezvous=Rendezvous(share.master_addr, (share.master_port,)),
    )
    try:
        resolve_mesh(parse_mesh(mesh), place)
    except MeshError as error:
        raise ConfigurationError(str(error)) from None
