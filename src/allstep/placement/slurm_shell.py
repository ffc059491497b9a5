"""Inside a SLURM job but not in a step: a batch script, or the shell that salloc gives.

Either is one process, whatever the job asked for, so it is a world of one.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Placement
from allstep.placement.slurm_step import is_special_step
from allstep.placement.variables import integer, text

_REMEDY = "SLURM sets it: start the script with srun, or unset SLURM_JOB_ID to run outside any job"


class SlurmShell:
    """The one process that SLURM's job script or interactive shell starts by itself."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether there is a job, and no step or only the one that salloc's shell is."""
        return "SLURM_JOB_ID" in environ and ("SLURM_STEP_NUM_TASKS" not in environ or is_special_step(environ))

    def place(self, environ: Mapping[str, str]) -> Placement:
        """A world of one, with a warning where the job asked for more; raises PlacementError."""
        asked = [
            f"{variable}={count}"
            for variable in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES")
            if variable in environ and (count := integer(environ, variable, _REMEDY, least=1)) > 1
        ]
        warning = (
            f"the job asked for more ({', '.join(asked)}), but this process was not started by srun and trains alone;"
            " start the script with srun to use them all"
        )
        return Placement(
            launcher="alone",
            run_id=text(environ, "SLURM_JOB_ID", _REMEDY),
            attempt=integer(environ, "SLURM_RESTART_COUNT", _REMEDY) if "SLURM_RESTART_COUNT" in environ else 0,
            warnings=(warning,) if asked else (),
        )
