"""torchrun, and whatever else starts workers through torch's elastic agent, such as `accelerate launch`.

TORCHELASTIC_RESTART_COUNT is counted by each node's agent: after a failure on one node only, torch lets them differ.
"""

from __future__ import annotations

from collections.abc import Mapping

from allstep.placement.placement import Placement
from allstep.placement.torch_variables import place_by_torch_variables
from allstep.placement.variables import fail, integer

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
