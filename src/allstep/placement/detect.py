"""Which launcher started this process, and where that puts it.

Contract: `detect` reads nothing but the mapping it is given, connects to nothing, and either returns a consistent
`Placement` or raises `PlacementError`. The launchers are asked in order, innermost first: what may run inside another
comes before it. torchrun inside an srun step is torchrun; mpirun inside a SLURM job is MPI, since the step it runs in
is that of its own daemons. Each launcher has a file beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.batch_systems import SchedulerScript
from allstep.placement.by_hand import ByHand
from allstep.placement.kubernetes import KubernetesPod
from allstep.placement.mpi import Mpi
from allstep.placement.placement import LauncherEnvironment, Placement
from allstep.placement.slurm import SlurmShell, SlurmStep
from allstep.placement.torchrun import AllstepRun, Torchrun
from allstep.placement.xla import Xla


class SingleProcess:
    """What is left when no launcher's variables are there: one process, a world of one."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Always."""
        return True

    def place(self, environ: Mapping[str, str]) -> Placement:
        """A world of one, with a warning on a host of a TPU pod, whose other hosts it will not meet."""
        hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
        if environ.get("PJRT_DEVICE") != "TPU" or len(hosts) < 2:
            return Placement(launcher="alone")
        warning = (
            f"this host is one of {len(hosts)} of a TPU pod (TPU_WORKER_HOSTNAMES), but this process trains alone;"
            " start one process per device on every host with torchrun or torch_xla.launch"
        )
        return Placement(launcher="alone", warnings=(warning,))


LAUNCHERS: tuple[LauncherEnvironment, ...] = (
    AllstepRun(),
    Torchrun(),
    ByHand(around=(Xla(), Mpi(), SlurmStep(), KubernetesPod())),
    Xla(),
    Mpi(),
    SlurmStep(),
    KubernetesPod(),
    SlurmShell(),
    SchedulerScript(),
    SingleProcess(),
)
"""Every way in which a process can have been started, in the order in which they are asked."""


def detect(environ: Mapping[str, str]) -> Placement:
    """Return this process's place, from environment variables alone.

    Args:
        environ: the environment, `os.environ` or a mapping like it. Nothing is written to it.

    Raises:
        PlacementError: a variable is missing, garbage, or contradicts another; the message names it, its value and
            the remedy.
    """
    return next(launcher for launcher in LAUNCHERS if launcher.matches(environ)).place(environ)
