"""What a machine says of itself to the others of its run: a pure function but for host name and pid."""

from __future__ import annotations

import os
import socket

from allstep.launch.joining import Join, token
from allstep.launch.machine import Launch
from allstep.version import __version__


def introduce(launch: Launch) -> Join:
    """Return this machine's introduction; its run is known by name, or by its SLURM step, or by its script's name."""
    assert launch.nodes is not None
    run = launch.settings.name or launch.nodes.job or os.path.basename(launch.command.target)
    return Join(
        run=run,
        token=token(run, launch.environ.get("ALLSTEP_SECRET", "")),
        nodes=launch.nodes.count,
        node_rank=launch.nodes.rank,
        workers=launch.workers,
        host=socket.gethostname(),
        pid=os.getpid(),
        facts=_facts(launch),
    )


def _facts(launch: Launch) -> dict[str, str]:
    """The settings that have to be the same on all machines."""
    settings = launch.settings
    return {
        "the version of allstep": __version__,
        "the script": launch.command.target,
        "the script's arguments": repr(list(launch.command.arguments)),
        "name": str(settings.name),
        "max_restarts": str(settings.max_restarts),
        "stop_after": str(settings.stop_after),
        "limits": str(settings.limits),
        "fault": str(settings.fault),
    }
