"""Which launcher started this process, and where that puts it.

Contract: `detect` reads nothing but the mapping it is given, connects to nothing, and either returns a consistent
`Placement` or raises `PlacementError`. The launchers are asked in order, innermost first: what may run inside another
comes before it. torchrun inside an srun step is torchrun; mpirun inside a SLURM job is MPI, since the step it runs in
is that of its own daemons. Each launcher has a file beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.by_hand import ByHand
from allstep.placement.mpi import Mpi
from allstep.placement.placement import Alone, LauncherEnvironment, Placement
from allstep.placement.slurm import SlurmShell, SlurmStep
from allstep.placement.torchrun import AllstepRun, Torchrun
from allstep.placement.xla import Xla

LAUNCHERS: tuple[LauncherEnvironment, ...] = (
    AllstepRun(),
    Torchrun(),
    ByHand(around=(Xla(), Mpi(), SlurmStep())),
    Xla(),
    Mpi(),
    SlurmStep(),
    SlurmShell(),
    Alone(),
)


def detect(environ: Mapping[str, str]) -> Placement:
    """Return this process's place, from environment variables alone.

    Args:
        environ: the environment, `os.environ` or a mapping like it. Nothing is written to it.

    Raises:
        PlacementError: a variable is missing, garbage, or contradicts another; the message names it, its value and
            the remedy.
    """
    return next(launcher for launcher in LAUNCHERS if launcher.matches(environ)).place(environ)
