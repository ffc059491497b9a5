"""torchrun, and whatever else starts workers through torch's elastic agent, such as `accelerate launch`.

TORCHELASTIC_RESTART_COUNT is counted by each node's agent: after a failure on one node only, torch lets them differ.

`allstep run`: torchrun's variables, and ALLSTEP_RUN_ID and ALLSTEP_ATTEMPT, which say who set them.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Placement
from allstep.placement.variables import fail, integer, place_by_torch_variables, text

_REMEDY = "torchrun sets it: start the script with torchrun, or unset TORCHELASTIC_RUN_ID"


class Torchrun:
    """A worker of torchrun, also where that runs inside a SLURM step."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether TORCHELASTIC_RUN_ID is set."""
        return "TORCHELASTIC_RUN_ID" in environ

    def place(self, environ: Mapping[str, str]) -> Placement:
        """Its place; raises PlacementError."""
        run_id = environ["TORCHELASTIC_RUN_ID"]
        if not run_id:
            fail(environ, "TORCHELASTIC_RUN_ID", "it must not be empty", _REMEDY)
        if run_id == "none":  # torchrun's default --rdzv-id, which names no job
            run_id = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
        return place_by_torch_variables(
            environ,
            launcher="torchrun",
            run_id=run_id,
            attempt=integer(environ, "TORCHELASTIC_RESTART_COUNT", _REMEDY),
            remedy=_REMEDY,
        )


_allstep_run_REMEDY = "`allstep run` sets it: start the script with that alone, or unset ALLSTEP_RUN_ID"


class AllstepRun:
    """A worker of `allstep run`, also where that runs inside a SLURM step."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether ALLSTEP_RUN_ID is set."""
        return "ALLSTEP_RUN_ID" in environ

    def place(self, environ: Mapping[str, str]) -> Placement:
        """Its place; raises PlacementError, also where another torchrun-like launcher has set variables since."""
        run_id = text(environ, "ALLSTEP_RUN_ID", _allstep_run_REMEDY)
        attempt = integer(environ, "ALLSTEP_ATTEMPT", _allstep_run_REMEDY)
        inner = environ.get("TORCHELASTIC_RUN_ID", run_id)
        if inner != run_id:
            problem = f"TORCHELASTIC_RUN_ID is {inner!r}, so torchrun and `allstep run` both claim this process"
            fail(environ, "ALLSTEP_RUN_ID", problem, "Start with one of the two, or unset the other's variables")
        if "TORCHELASTIC_RESTART_COUNT" in environ:
            restarts = integer(environ, "TORCHELASTIC_RESTART_COUNT", _allstep_run_REMEDY)
            if restarts != attempt:
                fail(environ, "ALLSTEP_ATTEMPT", f"TORCHELASTIC_RESTART_COUNT is {restarts}", _allstep_run_REMEDY)
        return place_by_torch_variables(
            environ, launcher="allstep", run_id=run_id, attempt=attempt, remedy=_allstep_run_REMEDY
        )
