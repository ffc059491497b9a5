"""The supervisor of this machine's workers: from settings and a command to the exit status of the run.

Contract: `launch` is what `allstep run` calls, from the main thread. It works out everything that can be wrong before
anything is started, and returns the run's exit status when no worker of this machine is left. In order:
1. `prepare` looks at the script, the devices and the other machines, and says what is to be started.
2. `supervise` starts it and watches it. One event loop waits for everything at once: workers' ends (pidfd), their
   output, monitoring, signals, other machines, room to write, and the next deadline. Nothing is polled.
3. On the only machine of a run, and on node 0 of several, `head` begins attempts and decides; on the others `follower`
   does what it is told.
What can go wrong before the first worker runs is a LaunchError, ConfigurationError or PlacementError.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from allstep.errors import LaunchError
from allstep.launch.device_types import devices_of, rocm_gpus, tpu_chips, tpu_environment
from allstep.launch.devices import probe_hardware
from allstep.launch.event_loop import SignalPipe
from allstep.launch.head import lead
from allstep.launch.init_process import leave_init_to_parent
from allstep.launch.machine import Launch, Machine
from allstep.launch.settings import LaunchSettings, shown_ranks
from allstep.launch.syntax_check import syntax_error
from allstep.launch.worker_plan import Command, worker_count
from allstep.run_record.run_folders import default_name

if TYPE_CHECKING:
    from allstep.launch.devices import Devices
    from allstep.launch.topology import Nodes

_JOB_NUMBERS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "SGE_TASK_ID")
"""Variables of schedulers' jobs; outside of these, what a job has need not even be loaded."""


def launch(settings: LaunchSettings, command: Command) -> int:
    """Run a command on this machine's devices, as the settings say.

    Returns:
        The run's exit status.

    Raises:
        LaunchError: there is nothing to run, a worker could not be started, or machines did not come together.
        ConfigurationError: a setting cannot be met here.
        PlacementError: a SLURM step says inconsistently which machine this is.
    """
    leave_init_to_parent()
    return supervise(prepare(settings, command, os.environ))


def prepare(settings: LaunchSettings, command: Command, inherited: Mapping[str, str]) -> Launch:
    """Say what is to be started on this machine; `inherited` is the environment that workers get.

    Raises:
        LaunchError: the script, or the checkpoint to resume from, is not there.
        ConfigurationError: a setting cannot be met here.
        PlacementError: a SLURM step says inconsistently which machine this is.
    """
    settings = _without_limits_to_debug(_with_absolute_resume(settings))
    if not command.module:
        _check_script(command.target)
    # Names this launch for scripts that want to do something once in all its attempts.
    environ = {**inherited, "ALLSTEP_LAUNCH": secrets.token_hex(8)}
    devices = devices_of(settings.device, {**environ, **settings.env}, probe_hardware, tpu_chips, rocm_gpus)
    workers = worker_count(settings, devices)
    if settings.device == "tpu":
        environ |= tpu_environment(workers, settings.nnodes or 1, {**environ, **settings.env})
    if devices.unused and settings.nproc == "auto":
        print(f"allstep: {devices.unused}", file=sys.stderr, flush=True)
    if devices.doubt and settings.nproc == "auto":
        start = f"{workers} worker{'' if workers == 1 else 's'} will be started; give --nproc for another number"
        print(f"allstep: warning: {devices.doubt}: {start}", file=sys.stderr, flush=True)
    nodes = _nodes(settings, environ)
    cores, bound = _cores(environ, settings, devices, workers)
    if nodes is None:
        shown_ranks(settings.show, workers)  # with several machines it is checked when all have come
    return Launch(
        settings=settings,
        command=command,
        name=settings.name or default_name(command.target, time.strftime("%Y%m%d-%H%M%S")),
        workers=workers,
        devices=devices,
        cores=cores,
        environ=environ,
        nodes=nodes,
        bound=bound,
    )


def supervise(to_start: Launch) -> int:
    """Run this machine's part of a run to its end.

    Returns:
        The run's exit status.

    Raises:
        LaunchError: a worker could not be started, or the machines did not come together.
        ConfigurationError: output was asked for of a rank that does not exist.
    """
    with SignalPipe() as signals, contextlib.closing(Machine(to_start, signals)) as machine:
        try:
            if to_start.nodes is None or to_start.nodes.head:
                return lead(machine)
            from allstep.launch.follower import follow  # what only some machines need is loaded there only

            return follow(machine)
        finally:
            machine.write_out()


def _with_absolute_resume(settings: LaunchSettings) -> LaunchSettings:
    """The same settings, with a local path to resume from made absolute: a script may change its folder."""
    if settings.resume in (None, "auto", "none") or "://" in str(settings.resume):
        return settings
    path = str(Path(str(settings.resume)).absolute())
    if not os.path.isdir(path):
        raise LaunchError(
            f"resume is {settings.resume}, and there is no folder of that name (in {os.getcwd()}); give the path of a "
            "checkpoint or of a folder of checkpoints, auto, or none"
        )
    return replace(settings, resume=path)


def _without_limits_to_debug(settings: LaunchSettings) -> LaunchSettings:
    """The same settings, and where one rank is debugged no limit but those that were given: a person takes long."""
    if settings.debug_rank is None or settings.limits is not None:
        return settings
    from allstep.diagnosis.hang import WITHOUT_LIMITS

    return replace(settings, limits=WITHOUT_LIMITS)


def _check_script(path: str) -> None:
    if not os.path.exists(path):
        raise LaunchError(f"script {path} does not exist (in {os.getcwd()}); for a module use -m")
    if not os.access(path, os.R_OK):
        raise LaunchError(f"script {path} cannot be read")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "__main__.py")):
        raise LaunchError(f"script {path} is a folder without a __main__.py")
    _check_syntax(path)


def _check_syntax(path: str) -> None:
    """Say a syntax error once, before every rank would."""
    error = syntax_error(path)
    if error is not None:
        text = "".join(traceback.format_exception_only(error)).rstrip()
        what = (
            f"script {path}"
            if Path(error.filename or path) == Path(path)
            else f"{error.filename}, which script {path} imports,"
        )
        raise LaunchError(f"{what} is not valid Python, so no rank was started\n{text}") from error


def _nodes(settings: LaunchSettings, environ: Mapping[str, str]) -> Nodes | None:
    """This machine's place among several, with a warning where there are others that it does not use."""
    said = (settings.nnodes, settings.node_rank, settings.rdzv) != (None, None, None)
    if not said and not any(number in environ for number in _JOB_NUMBERS):
        return None
    from allstep.launch.topology import find_nodes, warning

    nodes = find_nodes(settings, environ)
    if nodes is None and (text := warning(environ)):
        print(f"allstep: warning: {text}", file=sys.stderr, flush=True)
    return nodes


def _cores(
    environ: dict[str, str], settings: LaunchSettings, devices: Devices, workers: int
) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """How many cores this process may use, and which of them each worker is to run on, where that is decided here."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1, ()
    allowed = sorted(os.sched_getaffinity(0))  # what a container or a batch job may use of the machine's cores
    if "SLURM_JOB_ID" not in environ:
        return len(allowed), ()
    from allstep.launch.core_binding import bind_workers, granted_cores

    granted = granted_cores(environ)
    if granted is None:
        return len(allowed), ()
    cores = min(granted, len(allowed))
    if cores < len(allowed):  # not kept to its cores, a single worker would take threads for all of them
        environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    return cores, bind_workers(allowed, granted, devices.names, workers, {**environ, **settings.env})
