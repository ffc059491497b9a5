"""What a run is told to go on from: by its script, by the command line, and by what the same launch has saved before.

Contract: pure functions over an environment, asked by `Checkpoint.resume`. The command line's word, which comes in
ALLSTEP_RESUME, holds for scripts that name nothing themselves. It is about a launch, not about each start of its
processes: a supervisor's restart, or a requeued SLURM job, has the same ALLSTEP_RESUME and goes on from what the
launch itself has saved, if anything. So every checkpoint says which launch saved it.
"""

from __future__ import annotations

from collections.abc import Mapping

RESUME_VARIABLE = "ALLSTEP_RESUME"
LAUNCH_VARIABLE = "ALLSTEP_LAUNCH"


def asked_for(at: str, environ: Mapping[str, str]) -> str:
    """What to resume from, given the script's word: "auto", "none", or a path."""
    return at if at != "auto" else environ.get(RESUME_VARIABLE) or "auto"


def overruled(at: str, environ: Mapping[str, str]) -> str | None:
    """What the command line asks for and the script's word does not grant, or None."""
    asked = environ.get(RESUME_VARIABLE) or "auto"
    return asked if asked not in ("auto", asked_for(at, environ)) else None


def launches_of(environ: Mapping[str, str]) -> list[str]:
    """Names of what this process was launched by, for its checkpoints: each is the same in all restarts of that."""
    job, launch = environ.get("SLURM_JOB_ID"), environ.get(LAUNCH_VARIABLE)
    elastic = environ.get("TORCHELASTIC_RUN_ID", "none")
    names = [f"allstep-{launch}"] if launch else [] if elastic in ("", "none") else [f"torchrun-{elastic}"]
    return [*names, *([f"slurm-{job}"] if job else [])]


def restarts_of(environ: Mapping[str, str]) -> list[str]:
    """Those of `launches_of` that may have been here before, so that their checkpoints are to be gone on from.

    A job and a run id of torchrun's may have other runs in them; only their restarts are the same run. (An attempt of
    `allstep run` has a number that grows over several uses of its name, and no other launch has its launch's name.)
    """
    requeued = environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    restarted = environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    again = {"allstep": True, "torchrun": restarted, "slurm": requeued}
    return [name for name in launches_of(environ) if again[name.partition("-")[0]]]
