"""`allstep run`: torchrun's variables, and ALLSTEP_RUN_ID and ALLSTEP_ATTEMPT, which say who set them."""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Placement
from allstep.placement.torch_variables import place_by_torch_variables
from allstep.placement.variables import fail, integer, text

_REMEDY = "`allstep run` sets it: start the script with that alone, or unset ALLSTEP_RUN_ID"


class AllstepRun:
    """A worker of `allstep run`, also where that runs inside a SLURM step."""

    def matches(self, environ: Mapping[str, str]) -> bool:
        """Whether ALLSTEP_RUN_ID is set."""
        return "ALLSTEP_RUN_ID" in environ

    def place(self, environ: Mapping[str, str]) -> Placement:
        """Its place; raises PlacementError, also where another torchrun-like launcher has set variables since."""
        run_id = text(environ, "ALLSTEP_RUN_ID", _REMEDY)
        attempt = integer(environ, "ALLSTEP_ATTEMPT", _REMEDY)
        inner = environ.get("TORCHELASTIC_RUN_ID", run_id)
        if inner != run_id:
            problem = f"TORCHELASTIC_RUN_ID is {inner!r}, so torchrun and `allstep run` both claim this process"
            fail(environ, "ALLSTEP_RUN_ID", problem, "Start with one of the two, or unset the other's variables")
        if "TORCHELASTIC_RESTART_COUNT" in environ:
            restarts = integer(environ, "TORCHELASTIC_RESTART_COUNT", _REMEDY)
            if restarts != attempt:
                fail(environ, "ALLSTEP_ATTEMPT", f"TORCHELASTIC_RESTART_COUNT is {restarts}", _REMEDY)
        return place_by_torch_variables(environ, launcher="allstep", run_id=run_id, attempt=attempt, remedy=_REMEDY)
